"""What a pipeline schedule is made of: per rank, a list of computations and exchanges. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, Union

from dsv3_train.recipe.chunks import chunks_of, stage_count

KINDS = ("1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev")


class Op(NamedTuple):
    """One computation of one stage on one micro-batch."""

    kind: Literal["F", "B", "I", "W"]
    """Forward; whole backward; its gradients of inputs alone; its gradients of weights, some time after I."""
    direction: int
    """1 for the micro-batches that enter the pipeline at its last rank (dualpipe), else 0."""
    stage: int
    """In the order of that direction: stage 0 embeds, the last one computes the loss."""
    micro_batch: int
    """Counted within its direction."""

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.micro_batch} at stage {self.stage}" + ("'" if self.direction else "")


class Message(NamedTuple):
    """A tensor on its way to the next stage of a direction: an activation (F) onward, its gradient (B) back."""

    kind: Literal["F", "B"]
    direction: int
    stage: int
    """The stage that made it."""
    micro_batch: int


class Transfer(NamedTuple):
    """One rank's end of a message."""

    sends: bool
    peer: int
    """Pipeline rank of the other end."""
    message: Message


class Compute(NamedTuple):
    """One operation, or a forward and a whole backward, in that order, whose kernels overlap (F&B)."""

    ops: tuple[Op, ...]


def name_in_trace(ops: tuple[Op, ...]) -> str:
    """Of the range in a profiler's trace: `F stage 2 micro-batch 5`; of a pair, both."""
    return " & ".join(f"{op.kind} stage {op.stage} micro-batch {op.micro_batch}" for op in ops)


PAIR_IN_TRACE = re.compile(r"F stage \d+ micro-batch \d+ & B stage \d+ micro-batch \d+")
"""What `name_in_trace` makes of an F&B pair."""


class Exchange(NamedTuple):
    """Transfers posted together, so that their order among themselves cannot block."""

    transfers: tuple[Transfer, ...]


Event = Union[Compute, Exchange]


def made(op: Op) -> Message | None:
    """The tensor that an operation makes for a neighbour stage, on whichever rank; what W makes is nobody's input."""
    kind, direction, stage, micro_batch = op
    return None if kind == "W" else Message("F" if kind == "F" else "B", direction, stage, micro_batch)


def needed(op: Op, stages: int) -> Message | None:
    """The tensor of a neighbour stage that an operation works on; None for W and where the pipeline begins or ends."""
    kind, direction, stage, micro_batch = op
    if kind == "F" and stage > 0:
        return Message("F", direction, stage - 1, micro_batch)
    if kind in ("B", "I") and stage < stages - 1:
        return Message("B", direction, stage + 1, micro_batch)
    return None


@dataclass(frozen=True)
class Schedule:
    """The events of every rank for one global batch."""

    kind: str
    ranks: int
    virtual: int
    """Chunks per rank in the interleaved schedule; 1 otherwise."""
    micro_batches: tuple[int, ...]
    """Per direction."""
    events: tuple[tuple[Event, ...], ...]
    """Per rank, in order."""

    @property
    def stages(self) -> int:
        """Stages of each direction."""
        return stage_count(self.kind, self.ranks, self.virtual)

    def chunks(self, rank: int) -> list[tuple[int, int]]:
        """(direction, stage) of each chunk of `rank`."""
        return chunks_of(self.kind, self.ranks, rank, self.virtual)

    def rank_of(self, direction: int, stage: int) -> int:
        """The rank that holds a stage."""
        return next(rank for rank in range(self.ranks) if (direction, stage) in self.chunks(rank))
