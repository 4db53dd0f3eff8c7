"""Micro-batches of a run's global batches, in an order that no layout changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from dsv3_train.runtime.signals import ignore_in_worker

KEYS = ("tokens", "labels", "position_ids", "loss_mask")


class _Indices:
    """Sample numbers of each micro-batch of one data-parallel rank."""

    def __init__(self, plan: Iterable[tuple[int, int]], size: int, data_rank: int, data_size: int) -> None:
        self.plan, self.size, self.data_rank, self.data_size = plan, size, data_rank, data_size

    def __iter__(self) -> Iterator[range]:
        everyone = self.size * self.data_size
        for first, global_batch_size in self.plan:
            if global_batch_size % everyone:
                raise ValueError(f"a global batch of {global_batch_size} sequences is no multiple of {everyone}")
            for start in range(first + self.data_rank * self.size, first + global_batch_size, everyone):
                yield range(start, start + self.size)


def micro_batches(
    dataset: torch.utils.data.Dataset,
    plan: Iterable[tuple[int, int]],
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches: tokens, labels, position_ids (int64 [b, s]) and loss_mask (float32 [b, s]).

    Micro-batch m of a step on data-parallel rank r is the samples from first + (m * data_size + r) *
    micro_batch_size on, as Megatron orders them: a step sees the same samples in any layout.

    Args:
        plan: (first sample, global batch size) of each step; drawn as needed, ahead of time by `workers`.
        workers: processes that read ahead; 0 reads when asked.
    """
    indices = _Indices(plan, micro_batch_size, data_rank, data_size)
    if workers == 0:
        for samples in indices:
            batch = _stack([dataset[i] for i in samples])
            yield {name: x.pin_memory() for name, x in batch.items()} if pin_memory else batch
        return
    yield from torch.utils.data.DataLoader(
        dataset,
        batch_sampler=indices,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_stack,
        pin_memory=pin_memory,
        worker_init_fn=ignore_in_worker,
        # Its own, for the loader would draw a seed from the run's random numbers.
        generator=torch.Generator(),
    )


def within(
    vocab_size: int, batches: Iterator[dict[str, torch.Tensor]], outside: Callable[[int], None]
) -> Iterator[dict[str, torch.Tensor]]:
    """The same micro-batches, with 0 for every token and label that a model of so many has not.

    Args:
        outside: takes the number, within its micro-batch, of each sample that had one. It must not be trained on: under
            tensor parallelism an embedding takes any token for a zero.
    """
    for batch in batches:
        wrong_b = torch.zeros(len(batch["tokens"]), dtype=torch.bool)
        for name in ("tokens", "labels"):
            least, most = (int(x) for x in batch[name].aminmax())
            if least < 0 or most >= vocab_size:
                wrong_bs = (batch[name] < 0) | (batch[name] >= vocab_size)
                wrong_b |= wrong_bs.any(dim=1)
                batch[name] = batch[name].masked_fill(wrong_bs, 0)
        for number in wrong_b.nonzero().flatten().tolist():
            outside(number)
        yield batch


def _stack(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in KEYS}
