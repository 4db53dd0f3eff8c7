"""The order of computations on one rank, for the schedules that no published code gives exchanges for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal

from dsv3_train.pipeline.operations import Op, chunks_of

Order = list[tuple[Op, ...]]
"""Per computation its operations: one, or the two of an F&B pair."""
_Turn = tuple[Literal["F", "I", "W"], int]
"""Kind and chunk of the next operation."""


def one_forward_one_backward(ranks: int, rank: int, micro_batches: int) -> Order:
    """1F1B (PipeDream-Flush, arXiv 2006.09503), as Megatron-core runs it."""
    warm_up = min(ranks - rank - 1, micro_batches)
    forwards = [Op("F", 0, rank, m) for m in range(micro_batches)]
    backwards = [Op("B", 0, rank, m) for m in range(micro_batches)]
    return _alone(chain(forwards[:warm_up], _alternate(forwards[warm_up:], backwards)))


def interleaved(ranks: int, rank: int, micro_batches: int, virtual: int, pairs: bool) -> Order:
    """Megatron-core's interleaved 1F1B (arXiv 2104.04473, section 2.2): groups of `ranks` micro-batches per chunk.

    Args:
        micro_batches: a multiple of `ranks`.
        pairs: Megatron's form for `overlap_moe_expert_parallel_comm`: one forward more ahead, so that a forward and
            a backward of the steady state are independent and can overlap.
    """
    turns = [
        (chunk, first + m) for first in range(0, micro_batches, ranks) for chunk in range(virtual) for m in range(ranks)
    ]
    forwards = [Op("F", 0, chunk * ranks + rank, m) for chunk, m in turns]
    backwards = [Op("B", 0, (virtual - 1 - chunk) * ranks + rank, m) for chunk, m in turns]
    ahead = min(2 * (ranks - rank - 1) + (virtual - 1) * ranks + pairs, len(turns))
    steady = len(turns) - ahead
    if not pairs:
        return _alone(chain(forwards[:ahead], _alternate(forwards[ahead:], backwards)))
    return [
        *_alone(forwards[:ahead]),
        *zip(forwards[ahead:], backwards[:steady], strict=True),
        *_alone(backwards[steady:]),
    ]


def zero_bubble_h1(ranks: int, rank: int, micro_batches: int) -> Order:
    """ZB-H1 (arXiv 2401.10241, section 3.1): 1F1B whose weight gradients wait, no more of them than `rank`.

    The last rank's bubble becomes weight gradients, and no rank holds more micro-batches than in 1F1B.
    The first rank has no neighbour that waits for its gradients: it takes whole backwards.
    """
    if rank == 0:
        return one_forward_one_backward(ranks, rank, micro_batches)
    order: list[Op] = []
    for (op,) in one_forward_one_backward(ranks, rank, micro_batches):
        order.append(op if op.kind == "F" else op._replace(kind="I"))
        if op.kind == "B" and op.micro_batch >= rank:
            order.append(op._replace(kind="W", micro_batch=op.micro_batch - rank))
    late = range(max(0, micro_batches - rank), micro_batches)
    return _alone([*order, *(Op("W", 0, rank, m) for m in late)])


def zero_bubble_v(ranks: int, rank: int, micro_batches: int) -> Order:
    """ZB-V (arXiv 2401.10241, section 6): two chunks per rank in a V, as many activations as 1F1B, on every rank.

    Args:
        micro_batches: at least 2 * ranks - 1.
    """
    down: _Turn = ("F", 0)
    up: _Turn = ("F", 1)
    back_down: list[_Turn] = [("I", 0), ("W", 0)]
    back_up: list[_Turn] = [("I", 1), ("W", 1)]
    stages = [stage for _, stage in chunks_of("zbv", ranks, rank)]
    next_of = {(kind, chunk): iter(range(micro_batches)) for kind in "FIW" for chunk in (0, 1)}

    def ops(*turns: _Turn) -> Iterator[Op]:
        return (Op(kind, 0, stages[chunk], next(next_of[kind, chunk])) for kind, chunk in turns)

    first = 2 * (ranks - rank) - 1
    order = [
        *ops(*[down] * first),
        *ops(*[up, down] * rank),
        *ops(*[up, *back_up] * (ranks - rank)),
    ]
    new = micro_batches - first - rank
    for turn in range(micro_batches - ranks):  # steady: new ones while there are some, then those on their way
        order += ops(*[down] * (turn < new), *back_down, up, *back_up)
    order += ops(*[back_down[0], back_up[0]] * rank)
    order += ops(*back_down * (ranks - rank))
    order += ops(*back_up[1:] * rank, *back_down[1:] * rank)
    return _alone(order)


def _alone(ops: Iterable[Op]) -> Order:
    return [(op,) for op in ops]


def _alternate(forwards: list[Op], backwards: list[Op]) -> Iterator[Op]:
    """F, B, F, B, ..., then the backwards that are left."""
    for m, backward in enumerate(backwards):
        yield from forwards[m : m + 1]
        yield backward
