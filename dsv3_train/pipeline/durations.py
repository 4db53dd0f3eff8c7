"""How long operations take: one number per kind, and other ones for single stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from dsv3_train.pipeline.operations import Op, Schedule
from dsv3_train.pipeline.simulate import Duration


@dataclass(frozen=True)
class Durations:
    """Times in one unit, of a whole rank's layers unless `per_stage`. B = I + W and FB = F + B where not given."""

    F: float
    I: float  # noqa: E741
    W: float
    B: float | None = None
    FB: float | None = None
    """A forward and a whole backward whose kernels overlap."""
    stages: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Stage -> kinds that take another time there; FB by the stage of its forward."""
    per_stage: bool = False
    """Times of one stage, as measured, where a rank holds several; else of all the layers of a rank."""
    besides: Mapping[int, float] = field(default_factory=dict)
    """Stage -> further work, as a part of the times of all stages; no pair hides any of it."""

    def of(self, schedule: Schedule) -> Duration:
        """The duration of each computation of `schedule`. Any pair hides the share that FB does of F + B."""
        share = 1.0 if self.per_stage else schedule.ranks / schedule.stages

        def besides(op: Op) -> float:
            part = self.besides.get(op.stage, 0.0)
            return part * (self.whole if op.kind == "B" else getattr(self, op.kind))

        def alone(op: Op) -> float:
            own = self.stages.get(op.stage, {})
            if op.kind != "B" or "B" in own:
                return own.get(op.kind, getattr(self, op.kind))
            if "I" in own or "W" in own or self.B is None:
                return own.get("I", self.I) + own.get("W", self.W)
            return self.B

        def duration(ops: tuple[Op, ...]) -> float:
            layers = sum(map(alone, ops))
            if len(ops) > 1:
                own = self.stages.get(ops[0].stage, {})
                layers = own["FB"] if "FB" in own else layers * self.pair / (self.F + self.whole)
            return share * (layers + sum(map(besides, ops)))

        # A schedule asks for the same few times over and over.
        known: dict[tuple[tuple[str, int], ...], float] = {}

        def remembered(ops: tuple[Op, ...]) -> float:
            key = tuple((op.kind, op.stage) for op in ops)
            if key not in known:
                known[key] = duration(ops)
            return known[key]

        return remembered

    @property
    def whole(self) -> float:
        """Time of a whole backward."""
        return self.I + self.W if self.B is None else self.B

    @property
    def pair(self) -> float:
        """Time of an F&B pair."""
        return self.F + self.whole if self.FB is None else self.FB

    @property
    def hidden(self) -> float:
        """What overlap saves of a pair."""
        return self.F + self.whole - self.pair

    def with_head(self, schedule: Schedule, weight: float) -> Durations:
        """The same where the last stage also holds a head as heavy as `weight` of the layers of a rank."""
        part = weight * schedule.stages / schedule.ranks
        return dataclasses.replace(self, besides={schedule.stages - 1: part})


UNIT = Durations(F=1.0, I=1.0, W=1.0)
