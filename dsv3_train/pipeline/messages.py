"""Activations and their gradients on their way between pipeline ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from dsv3_train.pipeline.operations import Message, Transfer

_HEADER = 8  # kind, direction, stage, micro-batch, number of dimensions, three dimensions
_KINDS = "FB"
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
        sent = {t.message: outgoing.pop(t.message) for t in transfers if t.sends}
        shapes = {t.message: tuple(shape) for t in transfers if not t.sends}
        if self._headers:
            shapes = self._exchange_headers(transfers, sent)
        received = {m: torch.empty(size, dtype=self._dtype, device=self._device) for m, size in shapes.items()}
        # A detached alias keeps the storage while the caller frees `.data` of its own.
        tensors = [sent[t.message].detach() if t.sends else received[t.message] for t in transfers]
        works = self._start(transfers, tensors)
        for transfer, work in zip(transfers, works, strict=True):
            if not transfer.sends:
                self._arriving[transfer.message] = (received[transfer.message], work)
        sends = [work for t, works_ in zip(transfers, works, strict=True) if t.sends for work in works_]
        if sends:
            self._leaving.append((sends, [x for t, x in zip(transfers, tensors, strict=True) if t.sends]))
        while len(self._leaving) > _IN_FLIGHT:
            self._settle_oldest()

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

    def _exchange_headers(
        self, transfers: Sequence[Transfer], sent: dict[Message, torch.Tensor]
    ) -> dict[Message, tuple[int, ...]]:
        """Tell and learn what comes; the shapes to expect.

        Raises:
            RuntimeError: a message that the schedule does not mean here.
        """
        headers = [
            self._header(t.message, sent[t.message])
            if t.sends
            else torch.empty(_HEADER, dtype=torch.int64, device=self._device)
            for t in transfers
        ]
        for works in self._start(transfers, headers, header=True):
            for work in works:
                work.wait()
        shapes = {}
        for transfer, header in zip(transfers, headers, strict=True):
            if transfer.sends:
                continue
            kind, direction, stage, micro_batch, dimensions, *sizes = header.tolist()
            came = Message(_KINDS[kind], direction, stage, micro_batch)
            if self._checked and came != transfer.message:
                raise RuntimeError(
                    f"pipeline rank {self._me} expected {transfer.message} from rank {transfer.peer}, got {came}"
                )
            shapes[transfer.message] = tuple(sizes[:dimensions])
        return shapes

    def _header(self, message: Message, tensor: torch.Tensor) -> torch.Tensor:
        place = [_KINDS.index(message.kind), message.direction, message.stage, message.micro_batch]
        sizes = [*tensor.shape, 0, 0, 0][:3]
        return torch.tensor([*place, tensor.dim(), *sizes], dtype=torch.int64, device=self._device)
