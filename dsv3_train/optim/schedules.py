"""What changes over a run: learning rate, batch size, MTP weight, bias update speed.

The only state is the number of consumed samples, and where another layout or recipe brought a run off this plan, of
steps. A step's values are those at the tokens consumed *before* it, as in Megatron, so the first step of a warm-up
from 0 has learning rate 0. Consumed tokens are samples x sequence length.

A piece runs over the unit of its `until` (or, in the last piece, of the run's duration). So `{linear: [0, 2.2e-4],
until: 2000 steps}` rises by the same amount every step while the batch grows, as the report's warm-up does; a piece
until `469B` follows the tokens. Where units meet, the batch schedule converts one into the other exactly.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsv3_train.errors import UserError
from dsv3_train.recipe.quantity import Steps
from dsv3_train.recipe.schema import Recipe, Segment


@dataclass(frozen=True)
class Values:
    """The settings of one step."""

    lr: float
    batch_size: int
    """Sequences of the global batch."""
    mtp_weight: float
    bias_update_speed: float


@dataclass(frozen=True)
class _Piece:
    """A segment of a schedule from `begin` to `end`: steps if `in_steps`, else consumed tokens."""

    segment: Segment
    in_steps: bool
    begin: int
    end: int

    def over(self, step: int, tokens: int) -> bool:
        return (step if self.in_steps else tokens) >= self.end

    def value(self, step: int, tokens: int) -> float:
        """Past the end, the last value holds."""
        if self.segment.constant is not None:
            return self.segment.constant
        span = self.end - self.begin
        done = min(max((step if self.in_steps else tokens) - self.begin, 0), span)
        if self.segment.linear is not None:
            first, last = self.segment.linear
            # Product before quotient: batch sizes that should be whole numbers are.
            return first + (last - first) * done / span
        first, last = self.segment.cosine or (0.0, 0.0)
        return last + (first - last) * (1 + math.cos(math.pi * done / span)) / 2


class Schedules:
    """The schedules of a recipe, and the plan of steps that follows from them."""

    def __init__(self, recipe: Recipe) -> None:
        """Convert all pieces of the recipe to points in the run.

        Raises:
            UserError: a piece ends before it begins, or the last one before the run does, which only the batch
                schedule could tell (`recipe/checks.py` finds the others).
        """
        self._sequence_length = recipe.training.sequence_length
        self._multiple = recipe.batch_multiple
        self._duration = recipe.training.duration
        # Runs of steps with the same batch size: where each begins, and its size.
        self._steps: list[int] = []
        self._samples: list[int] = []
        self._sizes: list[int] = []

        # The batch schedule first: it tells how steps and tokens convert.
        self._batch = self._resolve("batch_size", recipe.schedule.batch_size, self._walk_through)
        self._others = {
            name: self._resolve(name, getattr(recipe.schedule, name), self._after)
            for name in ("lr", "mtp_weight", "bias_update_speed")
        }

        in_steps = isinstance(self._duration, Steps)
        self.total_steps: int = int(self._duration) if in_steps else self._step_at_tokens(self._duration)
        """Steps of the whole run."""
        self.total_samples: int = self._sample_at(self.total_steps)
        """Sequences that those steps consume."""
        self.enough_samples: int = self.total_samples + max(self._sizes)
        """Sequences to have ready: off the plan the end may be up to a batch later."""
        self.total_tokens: int = self.total_samples * self._sequence_length if in_steps else self._duration
        """Planned length. Given in tokens, the last step ends up to a batch later."""
        for name, pieces in {"batch_size": self._batch, **self._others}.items():
            self._require_to_the_end(name, pieces)

    def at(self, consumed_samples: int, step: int | None = None) -> Values:
        """The settings of the step that begins when `consumed_samples` sequences are consumed.

        Args:
            step: its number, from 0, in a run that came off this plan; None: the plan's.
        """
        step = self.step_of(consumed_samples) if step is None else step
        tokens = consumed_samples * self._sequence_length
        others = {name: _active(pieces, step, tokens).value(step, tokens) for name, pieces in self._others.items()}
        return Values(batch_size=self._size(_active(self._batch, step, tokens), step, consumed_samples), **others)

    def step_of(self, consumed_samples: int) -> int:
        """Steps that consume this many sequences (a partly consumed one counts): the number of the next step."""
        run = bisect_right(self._samples, consumed_samples) - 1
        return self._steps[run] + -(-(consumed_samples - self._samples[run]) // self._sizes[run])

    def plan(self, consumed_samples: int = 0, step: int | None = None) -> Iterator[tuple[int, int, int]]:
        """(step, first sample, batch size) of every step from here to the end of the run; steps count from 0.

        `consumed_samples` may lie between the steps of this plan: another layout rounds batches otherwise.

        Args:
            step: as in `at`.
        """
        sample = consumed_samples
        step = self.step_of(consumed_samples) if step is None else step
        pieces = iter(self._batch)
        piece = next(pieces)
        while not self._finished(step, sample):
            while piece is not self._batch[-1] and piece.over(step, sample * self._sequence_length):
                piece = next(pieces)
            size, count = self._run(piece, step, sample)
            for _ in range(count):
                if self._finished(step, sample):
                    return
                yield step, sample, size
                step, sample = step + 1, sample + size

    def _finished(self, step: int, sample: int) -> bool:
        if isinstance(self._duration, Steps):
            return step >= self._duration
        return sample * self._sequence_length >= self._duration

    def _size(self, piece: _Piece, step: int, sample: int) -> int:
        """Batch size of the step that begins there, rounded down to what the layout can run, at least one such."""
        value = piece.value(step, sample * self._sequence_length)
        return max(self._multiple, int(value) // self._multiple * self._multiple)

    def _run(self, piece: _Piece, step: int, sample: int) -> tuple[int, int]:
        """Batch size there, and how many steps of `piece` in a row have it."""
        size = self._size(piece, step, sample)
        tokens = size * self._sequence_length
        end_step = piece.end if piece.in_steps else step - (sample * self._sequence_length - piece.end) // tokens
        left = end_step - step
        if left <= 0:  # past the last piece, where its last value holds
            return size, 1_000_000
        if piece.segment.constant is not None:
            return size, left
        # Pieces are monotonic: once the size differs it stays different.
        later = range(1, left)
        return size, 1 + bisect_left(later, True, key=lambda n: self._size(piece, step + n, sample + n * size) != size)

    def _walk_through(self, piece: _Piece) -> tuple[int, int]:
        """Append the runs of a piece of the batch schedule; step and tokens after it."""
        step, sample = (self._steps[-1], self._samples[-1]) if self._steps else (0, 0)
        while not piece.over(step, sample * self._sequence_length):
            size, count = self._run(piece, step, sample)
            self._open(step, sample, size)
            step, sample = step + count, sample + count * size
        self._open(step, sample, self._size(piece, step, sample))
        return step, sample * self._sequence_length

    def _open(self, step: int, sample: int, size: int) -> None:
        """A run begins; what was noted for the same step no longer counts."""
        if self._steps and self._steps[-1] == step:
            self._sizes[-1] = size
            return
        self._steps.append(step)
        self._samples.append(sample)
        self._sizes.append(size)

    def _sample_at(self, step: int) -> int:
        run = bisect_right(self._steps, step) - 1
        return self._samples[run] + (step - self._steps[run]) * self._sizes[run]

    def _step_at_tokens(self, tokens: int) -> int:
        """The first step that begins at or after so many tokens."""
        return self.step_of(-(-tokens // self._sequence_length))

    def _after(self, piece: _Piece) -> tuple[int, int]:
        """Step and tokens of the first step after a piece."""
        step = piece.end if piece.in_steps else self._step_at_tokens(piece.end)
        return step, self._sample_at(step) * self._sequence_length

    def _resolve(self, name: str, segments: list[Segment], after: Callable[[_Piece], tuple[int, int]]) -> list[_Piece]:
        """Segments as pieces with both ends in one unit."""
        pieces: list[_Piece] = []
        reached = (0, 0)
        for index, segment in enumerate(segments):
            until = self._duration if segment.until is None else segment.until
            in_steps = isinstance(until, Steps)
            if pieces and pieces[-1].in_steps == in_steps:
                begin = pieces[-1].end
            else:
                begin = reached[0] if in_steps else reached[1]
            if segment.until is None:
                until = max(until, begin + 1)  # a shortened run may end before its last piece begins
            elif until <= begin:
                raise UserError(
                    f"schedule.{name}.{index}.until: {segment.until} is not after the end of the piece before it, "
                    f"which is {begin} {'steps' if in_steps else 'tokens'} into the run; set a later one"
                )
            pieces.append(_Piece(segment, in_steps, begin, int(until)))
            reached = after(pieces[-1])
        return pieces

    def _require_to_the_end(self, name: str, pieces: list[_Piece]) -> None:
        until, last = pieces[-1].segment.until, self.total_steps - 1
        if until is None or last < 0:
            return
        if pieces[-1].over(last, self._sample_at(last) * self._sequence_length):
            raise UserError(
                f"schedule.{name}.{len(pieces) - 1}.until: {until} is before the end of the run, "
                f"training.duration={self._duration}; leave `until` out of the last piece"
            )


def _active(pieces: list[_Piece], step: int, tokens: int) -> _Piece:
    """The first piece that is not over, else the last."""
    return next((piece for piece in pieces if not piece.over(step, tokens)), pieces[-1])
