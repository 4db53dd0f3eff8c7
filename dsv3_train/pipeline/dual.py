"""DualPipe and DualPipeV as events of one rank: the order and the exchanges of DeepSeek's published classes.

Source: DeepSeek-V3 report, section 3.2.1; github.com/deepseek-ai/DualPipe, `step` of dualpipe.py and dualpipev.py,
whose eight steps stand here under the same numbers. A rank's phases are its chunks in order of stages: phase 0 is the
one that micro-batches reach first.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Literal

from dsv3_train.pipeline.operations import Compute, Event, Exchange, Message, Op, Transfer, chunks_of


def dual_events(kind: Literal["dualpipe", "dualpipev"], ranks: int, rank: int, micro_batches: int) -> list[Event]:
    """Events of one rank.

    Args:
        micro_batches: per direction; at least `ranks` of them for dualpipe, whose ranks are even in number, and
            twice `ranks` for dualpipev.
    """
    return _Rank(kind, ranks, rank).run(micro_batches)


class _Rank:
    """Emits one rank's events. Transfers gather until the next computation, which waits for all of them."""

    def __init__(self, kind: Literal["dualpipe", "dualpipev"], ranks: int, rank: int) -> None:
        self.rank = rank
        self.chunks = chunks_of(kind, ranks, rank)
        self.holder = {chunk: holder for holder in range(ranks) for chunk in chunks_of(kind, ranks, holder)}
        bidirectional = kind == "dualpipe"
        # Micro-batches travel `half` ranks until they meet their way back (V) or the other direction's half.
        self.half = ranks // 2 if bidirectional else ranks
        self.depth = min(rank, ranks - 1 - rank) if bidirectional else rank
        self.events: list[Event] = []
        self.pending: list[Transfer] = []
        self.waiting_for_weights: deque[Op] = deque()
        self.count: Counter[tuple[str, int]] = Counter()

    def run(self, micro_batches: int) -> list[Event]:
        n, h = self.half, self.depth
        middle = h == n - 1
        for _ in range(2 * (n - h - 1)):  # 1
            self.forward(0)
        self.receive("F", 0)
        for i in range(h + 1):  # 2
            self.forward(0, receive=False, send=middle)
            self.receive("F", 0)
            self.forward(1, send=not middle or i < h)
            if not middle:
                self.send("F", 0)
        for _ in range(n - h - 1):  # 3
            self.backward(1, split=True)
            self.receive("F", 1)
            self.weights()
            self.forward(1, receive=False)
        for i in range(micro_batches - 2 * n + h + 1):  # 4: the steady state
            if i == 0 and middle:  # apart, which starts the neighbours sooner; sends in the order that they expect
                self.forward(0, receive=False, send=False)
                self.send("F", 1)
                self.backward(1, send=False)
                self.send("F", 0)
                self.send("B", 1)
            else:
                self.pair(0, 1, receive=i > 0)
            self.pair(1, 0)
        for _ in range(n - h - 1):  # 5
            self.backward(1)
            self.pair(1, 0)
        for k in range(2 * (h + 1)):  # 6: the second half without weight gradients
            self.backward(1 - k % 2, split=k > h)
        for _ in range(n - h - 1):  # 7
            self.weights()
            self.backward(0, split=True)
        for _ in range(h + 1):  # 8
            self.weights()
        self.commit()
        return self.events

    def forward(self, phase: int, receive: bool = True, send: bool = True) -> None:
        if receive:
            self.receive("F", phase)
        self.compute(self.op("F", phase))
        if send:
            self.send("F", phase)

    def backward(self, phase: int, split: bool = False, send: bool = True) -> None:
        self.receive("B", phase)
        op = self.op("I" if split else "B", phase)
        self.compute(op)
        if split:
            self.waiting_for_weights.append(op)
        if send:
            self.send("B", phase)

    def pair(self, forward: int, backward: int, receive: bool = True) -> None:
        if receive:
            self.receive("F", forward)
        self.receive("B", backward)
        self.compute(self.op("F", forward), self.op("B", backward))
        self.send("F", forward)
        self.send("B", backward)

    def weights(self) -> None:
        self.compute(self.waiting_for_weights.popleft()._replace(kind="W"))

    def op(self, kind: Literal["F", "B", "I"], phase: int) -> Op:
        direction, stage = self.chunks[phase]
        return Op(kind, direction, stage, self.next("forward" if kind == "F" else "backward", phase))

    def send(self, kind: Literal["F", "B"], phase: int) -> None:
        direction, stage = self.chunks[phase]
        self.transfer(True, kind, phase, (direction, stage), (direction, stage + (1 if kind == "F" else -1)))

    def receive(self, kind: Literal["F", "B"], phase: int) -> None:
        direction, stage = self.chunks[phase]
        source = (direction, stage - (1 if kind == "F" else -1))
        self.transfer(False, kind, phase, source, source)

    def transfer(
        self, sends: bool, kind: Literal["F", "B"], phase: int, maker: tuple[int, int], other: tuple[int, int]
    ) -> None:
        peer = self.holder.get(other)
        if peer is None or peer == self.rank:  # an end of the pipeline; the turn of the V
            return
        micro_batch = self.next(f"{'send' if sends else 'receive'} {kind}", phase)
        self.pending.append(Transfer(sends, peer, Message(kind, *maker, micro_batch)))

    def next(self, what: str, phase: int) -> int:
        self.count[what, phase] += 1
        return self.count[what, phase] - 1

    def compute(self, *ops: Op) -> None:
        self.commit()
        self.events.append(Compute(ops))

    def commit(self) -> None:
        if self.pending:
            self.events.append(Exchange(tuple(self.pending)))
            self.pending = []
