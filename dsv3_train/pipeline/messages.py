"""Activations and their gradients on their way between pipeline ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist

from dsv3_train.pipeline.operations import Message, Transfer

_HEADER = 8  # kind, direction, stage, micro-batch, number of dimensions, three dimensions
_KINDS: tuple[Literal["F"], Literal["B"]] = ("F", "B")
_IN_FLIGHT = 8  # batches of sends that are let run on before the oldest is waited for


class Messages:
    """One rank's ends of a schedule's messages.

    A batch is posted at once and waited for when a tensor is needed (received) or its memory is (sent), so transfers
    run beside computation. What goes up the ranks and what goes down has a communicator each. On gloo a tag keeps
    kinds and directions apart; NCCL has none and pairs messages by their order, which `pipeline/check.py` proves.
    """

    def __init__(
        self, up: dist.ProcessGroup, down: dist.ProcessGroup, dtype: torch.dtype, *, headers: bool, checked: bool
    ) -> None:
        """`up` and `down`: two groups of the same pipeline ranks; `dtype` of all tensors.

        With `headers` a message's place and shape go before it: for sequences of differing length, and to `check` that
        each message is the one that the schedule means.
        """
        self._groups = {True: up, False: down}
        self._ranks = dist.get_process_group_ranks(up)
        self._me = up.rank()
        self._dtype, self._device = dtype, torch.cuda.current_device()
        self._headers, self._checked = headers or checked, checked
        self._arriving: dict[Message, tuple[torch.Tensor, list[dist.Work]]] = {}
        self._leaving: deque[tuple[list[dist.Work], list[torch.Tensor]]] = deque()
        for group in (up, down):  # NCCL makes a communicator at its first use, which every rank must join
            dist.all_reduce(torch.zeros(1, device=self._device), group=group)

    def post(self, transfers: Sequence[Transfer], outgoing: dict[Message, torch.Tensor], shape: Sequence[int]) -> None:
        """Start a batch. Tensors to send leave `outgoing`; received ones are of `shape` unless a header says."""
        sends, receives = [t for t in transfers if t.sends], [t for t in transfers if not t.sends]
        # A detached alias keeps the storage while the caller frees `.data` of its own.
        leaving = [outgoing.pop(t.message).detach() for t in sends]
        sizes: list[Sequence[int]] = [shape] * len(receives)
        if self._headers:
            headers = self._post_headers(sends, leaving, receives)
            # What is told of must be on its way: whoever waits for it may be whom the header that we wait for awaits.
            self._leave(leaving, self._start(sends, leaving))
            sizes = [self._read(transfer, *header) for transfer, header in zip(receives, headers, strict=True)]
            sends, leaving = [], []
        arriving = [torch.empty(tuple(size), dtype=self._dtype, device=self._device) for size in sizes]
        works = self._start([*sends, *receives], [*leaving, *arriving])
        self._leave(leaving, works[: len(sends)])
        for transfer, tensor, work in zip(receives, arriving, works[len(sends) :], strict=True):
            self._arriving[transfer.message] = (tensor, work)

    def take(self, message: Message) -> torch.Tensor:
        """The tensor of a posted message, once it is here."""
        tensor, works = self._arriving.pop(message)
        for work in works:
            work.wait()
        return tensor

    def finish(self) -> None:
        """Wait for all that was sent."""
        while self._leaving:
            self._settle_oldest()

    def _leave(self, tensors: list[torch.Tensor], works: list[list[dist.Work]]) -> None:
        """Keep what is being sent until it is."""
        if tensors:
            self._leaving.append(([work for some in works for work in some], tensors))
        while len(self._leaving) > _IN_FLIGHT:
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        works, _ = self._leaving.popleft()
        for work in works:
            work.wait()

    def _start(
        self, transfers: Sequence[Transfer], tensors: Sequence[torch.Tensor], header: bool = False
    ) -> list[list[dist.Work]]:
        """Post both ways' batches; the works that stand for each transfer."""
        works: list[list[dist.Work]] = [[] for _ in transfers]
        for upward, group in self._groups.items():
            chosen = [i for i, t in enumerate(transfers) if ((t.peer > self._me) == t.sends) == upward]
            if not chosen:
                continue
            batch = [
                dist.P2POp(
                    dist.isend if transfers[i].sends else dist.irecv,
                    tensors[i],
                    self._ranks[transfers[i].peer],
                    group,
                    tag=self._tag(transfers[i].message, header),
                )
                for i in chosen
            ]
            posted = dist.batch_isend_irecv(batch)
            for place, i in enumerate(chosen):  # NCCL returns one work for the whole batch
                works[i] = [posted[place]] if len(posted) == len(batch) else posted
        return works

    @staticmethod
    def _tag(message: Message, header: bool) -> int:
        return 4 * header + 2 * message.direction + _KINDS.index(message.kind) + 1

    def _post_headers(
        self, sends: list[Transfer], leaving: list[torch.Tensor], receives: list[Transfer]
    ) -> list[tuple[torch.Tensor, list[dist.Work]]]:
        """Tell what leaves, and begin to learn what comes: per receive, its header and when it is here."""
        told = [self._header(transfer.message, tensor) for transfer, tensor in zip(sends, leaving, strict=True)]
        learnt = [torch.empty(_HEADER, dtype=torch.int64, device=self._device) for _ in receives]
        works = self._start([*sends, *receives], [*told, *learnt], header=True)
        self._leave(told, works[: len(sends)])
        return list(zip(learnt, works[len(sends) :], strict=True))

    def _read(self, transfer: Transfer, header: torch.Tensor, works: list[dist.Work]) -> Sequence[int]:
        """The shape that a header gives.

        Raises:
            RuntimeError: it belongs to a message that the schedule does not mean here.
        """
        for work in works:
            work.wait()
        kind, direction, stage, micro_batch, dimensions, *sizes = header.tolist()
        came = Message(_KINDS[kind], direction, stage, micro_batch)
        if self._checked and came != transfer.message:
            raise RuntimeError(
                f"pipeline rank {self._me} expected {transfer.message} from rank {transfer.peer}, got {came}"
            )
        return sizes[:dimensions]

    def _header(self, message: Message, tensor: torch.Tensor) -> torch.Tensor:
        place = [_KINDS.index(message.kind), message.direction, message.stage, message.micro_batch]
        sizes = [*tensor.shape, 0, 0, 0][:3]
        return torch.tensor([*place, tensor.dim(), *sizes], dtype=torch.int64, device=self._device)
