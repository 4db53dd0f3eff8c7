"""Numbers that go wrong, and a wish to stop: decided in each step, by all ranks alike."""

from __future__ import annotations

import enum
import math
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from dsv3_train.checkpoint.state import Guarded
from dsv3_train.errors import UserError
from dsv3_train.optim.schedules import Schedules
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime.exits import CORRUPT
from dsv3_train.runtime.signals import StopRequest
from dsv3_train.training.integrity import Rerun, compare_replicas, finite_gradients
from dsv3_train.training.losses import Losses
from dsv3_train.training.skips import Skip, Skips
from dsv3_train.training.spikes import Spikes
from dsv3_train.training.step import Trainer

_NO_SAMPLE = 2**62


class Verdict(enum.Enum):
    """What follows from a step."""

    GO_ON = enum.auto()
    STOP = enum.auto()
    """All ranks agree that one was asked to: save and end."""
    PASS_OVER = enum.auto()
    """No update: its loss or gradients are not finite."""
    PASS_OVER_AND_STOP = enum.auto()
    ROLL_BACK = enum.auto()
    """No update: its loss is a spike, which earlier updates may have led to."""


class Guard:
    """Looks at every step's loss and gradients before they reach the parameters."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        trainer: Trainer,
        stop: StopRequest | None,
        incident: Callable[[str, str], None],
    ) -> None:
        """`incident` takes a kind and a line of text.

        Raises:
            UserError: the run's record of skipped samples cannot be read.
        """
        self._faults, self._trainer, self._stop, self._incident = recipe.faults, trainer, stop, incident
        self.skips = Skips(run_dir, recipe.faults.skip_samples)
        self._spikes = Spikes(recipe.faults.spike, recipe.faults.spike_window)
        self._schedules = Schedules(recipe)
        self._unusable = 0
        self._loss = math.nan
        self._routing_biases = [
            router.expert_bias
            for model in trainer.models
            for router in model.modules()
            if getattr(router, "expert_bias", None) is not None
        ]

    @property
    def asked(self) -> str:
        """The signal that this rank got, or that another one did."""
        return self._stop.name if self._stop and self._stop.name else "another rank was"

    def restore(self, guarded: Guarded) -> None:
        """Know what a checkpoint knew."""
        self._spikes = Spikes(self._faults.spike, self._faults.spike_window, guarded.losses)
        self._unusable = 0

    def kept(self, consumed_samples: int) -> Guarded:
        """What a checkpoint at this position has to know."""
        return Guarded(list(self._spikes.losses), self.skips.before(consumed_samples))

    def stop(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return self._agree(False)[1]

    def gradients(
        self,
        compute: Callable[[], Losses],
        step: int,
        first_sample: int,
        batch_size: int,
        outside: int | None = None,
        told: Callable[[int], str] = str,
    ) -> tuple[Losses, Verdict]:
        """Compute a step's gradients, and whether they may be applied. Collective.

        Routing biases, which Megatron updates with the gradients, are as before where they may not.

        Args:
            outside: a sample that this rank read, of which a token is outside the vocabulary.
            told: what to say of such a sample.

        Raises:
            UserError: more batches in a row than the recipe allows were unusable.
            SystemExit: computed twice, they differ, or the replicas of a parameter do (`CORRUPT`).
        """
        before = [bias.clone() for bias in self._routing_biases]

        def again() -> Losses:
            self._put_back(before)
            return compute()

        losses = compute()
        if self._faults.rerun_interval and step % self._faults.rerun_interval == 0:
            self._end_if(Rerun(self._trainer, again).compare(losses), step)
        if self._faults.compare_interval and step % self._faults.compare_interval == 0:
            self._end_if(compare_replicas(self._trainer), step)
        unusable, stop = self._agree(
            outside is not None or not math.isfinite(losses.loss) or not finite_gradients(self._trainer)
        )
        self._loss = losses.loss
        if unusable:
            self._put_back(before)
            first = self.first_outside(outside)
            self._pass_over(losses, step, first_sample, batch_size, None if first is None else told(first))
            return losses, Verdict.PASS_OVER_AND_STOP if stop else Verdict.PASS_OVER
        self._unusable = 0
        if self._spikes.add(losses.loss):
            if self.skips.rollbacks() < self._faults.max_rollbacks:
                self._put_back(before)
                return losses, Verdict.ROLL_BACK
            self._spikes.take(losses.loss)  # it is trained on
            self._incident(
                "spike", f"step {step}: loss {losses.loss:.4f} is a spike, and faults.max_rollbacks is used up"
            )
        return losses, Verdict.STOP if stop else Verdict.GO_ON

    def spike(self, first_sample: int, batch_size: int, step: int, batches: int | None = None) -> Skip:
        """What to pass over for a spike at a global batch: that one and those before it that the recipe says."""
        more = (batches or self._faults.spike_batches) - 1
        first = first_sample
        for earlier in range(step - 1, max(step - 1 - more, 0), -1):
            first = self._begin(earlier, first)
        return Skip(first, first_sample + batch_size - 1, "spike", step, self._loss)

    def _begin(self, step: int, end: int) -> int:
        """First sample of a step (from 1), of which `end` is the first that it does not consume.

        Sizes are the schedule's at a batch's first sample, so it is searched for: the last from which a batch ends at
        `end` or before. (Where sizes fall by tokens more than one can fit.)
        """

        def ends(first: int) -> int:
            return first + self._schedules.at(first, step - 1).batch_size

        return max(0, bisect_right(range(end), end, key=ends) - 1)

    def first_outside(self, sample: int | None) -> int | None:
        """The first of the samples that ranks found to hold a token outside the vocabulary. Collective."""
        first = torch.tensor(_NO_SAMPLE if sample is None else sample, device=torch.cuda.current_device())
        torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
        return None if int(first) == _NO_SAMPLE else int(first)

    def _pass_over(self, losses: Losses, step: int, first_sample: int, batch_size: int, outside: str | None) -> None:
        self._unusable += 1
        last = first_sample + batch_size - 1
        finite = math.isfinite(losses.loss) and outside is None
        what = f"a gradient is not finite (loss {losses.loss:.4f})" if finite else f"loss is {losses.loss}"
        reason: Literal["token", "not finite"] = "token" if outside else "not finite"
        what = outside or what
        self._incident(reason, f"step {step}: {what}; passed over, samples {first_sample}-{last}")
        skip = Skip(first_sample, last, reason, step, losses.loss if finite else None)
        self.skips.add(skip, write=torch.distributed.get_rank() == 0)
        if self._unusable >= self._faults.max_unusable:
            remedy = "prepare the data with the tokenizer of this model" if outside else "lower schedule.lr"
            raise UserError(
                f"step {step}: {what}, as in the {self._unusable - 1} global batches before it "
                f"(faults.max_unusable); go back to an earlier checkpoint, or {remedy}"
            )

    def _put_back(self, routing_biases: list[torch.Tensor]) -> None:
        for bias, before in zip(self._routing_biases, routing_biases, strict=True):
            bias.copy_(before)

    def _agree(self, unusable: bool) -> tuple[bool, bool]:
        """(unusable on any rank, any rank asked to stop)."""
        asked = self._stop is not None and self._stop.name is not None
        flags = torch.tensor([unusable, asked], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return bool(flags[0].item()), bool(flags[1].item())

    def _end_if(self, who: str | None, step: int) -> None:
        if who is not None:
            self._incident("corrupt", f"step {step}: {who}")
            raise SystemExit(CORRUPT)
