"""Whether a schedule can run: every operation there and once, every tensor made, sent, received and used in order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from dsv3_train.pipeline.operations import Compute, Exchange, Message, Op, Schedule, Transfer, made, needed


class Unsound(Exception):
    """A schedule that cannot run, or would compute something else; one finding per line."""


def check(schedule: Schedule, forward_only: bool = False) -> None:
    """Raise `Unsound` with all `findings`, if there are any."""
    found = findings(schedule, forward_only)
    if found:
        raise Unsound("\n".join(found))


def findings(schedule: Schedule, forward_only: bool = False) -> list[str]:
    """What is wrong with a schedule, one line per fault; empty if nothing is.

    1. Every stage has, on the rank that holds it, one F per micro-batch, and either one B or one I and one W.
    2. A computation starts with its input at hand: made earlier on its own rank, or received earlier.
    3. A tensor is sent after it was made, once, to the rank of the stage that needs it.
    4. What one rank sends another is received in the order of sending, so that no two tensors are swapped where
       messages carry no tag (NCCL).
    5. No deadlock where an exchange blocks until each of its partners has posted its end.

    From 2 to 5 it follows that dependencies hold across ranks.

    Args:
        forward_only: there are to be forwards alone.
    """
    found = [*_operations(schedule, forward_only), *_channels(schedule)]
    for rank, events in enumerate(schedule.events):
        found += _Rank(schedule, rank).run(events)
    return found or list(_deadlock(schedule))


def _operations(schedule: Schedule, forward_only: bool) -> Iterator[str]:
    """Every operation once, on its own rank."""
    counts: Counter[tuple[int, tuple]] = Counter(
        (rank, op)
        for rank, events in enumerate(schedule.events)
        for event in events
        if isinstance(event, Compute)
        for op in event.ops
    )
    for rank in range(schedule.ranks):
        for direction, stage in schedule.chunks(rank):
            for micro_batch in range(schedule.micro_batches[direction]):
                times = [counts.pop((rank, (kind, direction, stage, micro_batch)), 0) for kind in "FBIW"]
                where = f"rank {rank}, {_of((direction, stage, micro_batch))}"
                if times[0] != 1:
                    yield f"{where}: {times[0]} forwards"
                if times[1:] not in ([[0, 0, 0]] if forward_only else [[1, 0, 0], [0, 1, 1]]):
                    yield f"{where}: {times[1]} B, {times[2]} I and {times[3]} W"
    for rank, op in counts:
        yield f"rank {rank} has no place for {op[0]} of {_of(op[1:])}"


def _channels(schedule: Schedule) -> Iterator[str]:
    """Sends and receives of each ordered pair of ranks, in order."""
    sent: defaultdict[tuple[int, int], list[Message]] = defaultdict(list)
    received: defaultdict[tuple[int, int], list[Message]] = defaultdict(list)
    for rank, events in enumerate(schedule.events):
        for event in events:
            if isinstance(event, Compute):
                continue
            for sends, peer, message in event.transfers:
                if sends:
                    sent[rank, peer].append(message)
                else:
                    received[peer, rank].append(message)
    for channel in sorted({*sent, *received}):
        there, here = sent[channel], received[channel]
        name = "from rank {} to {}".format(*channel)
        for number, (a, b) in enumerate(zip(there, here, strict=False)):
            if a != b:
                yield f"{name}, message {number}: sent {_message(a)}, received as {_message(b)}"
                break
        else:
            if len(there) != len(here):
                yield f"{name}: {len(there)} sent, {len(here)} received"


def _deadlock(schedule: Schedule) -> Iterator[str]:
    """Ranks that wait for each other for ever, in a schedule without other faults: only exchanges can make them wait.

    An exchange is over once each of its partners has posted as many transfers the other way as the rank itself.
    """
    exchanges = [[event.transfers for event in events if isinstance(event, Exchange)] for events in schedule.events]
    posted: Counter[tuple[int, int, bool]] = Counter()
    """Per channel (from, to), and whether by the sender."""
    waits_for: list[dict[tuple[int, int, bool], int] | None] = [None] * schedule.ranks
    """In the exchange that a rank has posted: how many the other end of each channel must have posted."""
    at = [0] * schedule.ranks
    runnable = list(range(schedule.ranks))
    while runnable:
        rank = runnable.pop()
        while at[rank] < len(exchanges[rank]):
            awaited = waits_for[rank]
            if awaited is None:
                awaited = waits_for[rank] = {}
                for sends, peer, _ in exchanges[rank][at[rank]]:
                    source, target = (rank, peer) if sends else (peer, rank)
                    posted[source, target, sends] += 1
                    awaited[source, target, not sends] = posted[source, target, sends]
                    runnable.append(peer)
            if any(posted[end] < count for end, count in awaited.items()):
                break
            waits_for[rank] = None
            at[rank] += 1
    for rank, place in enumerate(at):
        if place < len(exchanges[rank]):
            ends = (f"{'send to' if s else 'receive from'} {p}: {_message(m)}" for s, p, m in exchanges[rank][place])
            yield f"deadlock: rank {rank} waits in exchange {place} ({'; '.join(ends)})"


class _Rank:
    """Walks through one rank's events with what is at hand on it."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.stages = schedule.stages
        self.rank = rank
        self.holder = {chunk: r for r in range(schedule.ranks) for chunk in schedule.chunks(r)}
        self.done: set[Op] = set()
        self.at_hand: set[Message] = set()
        self.sent: set[Message] = set()

    def run(self, events: tuple) -> Iterator[str]:
        for place, event in enumerate(events):
            faults = self.computes(event.ops) if isinstance(event, Compute) else self.exchanges(event.transfers)
            yield from (f"rank {self.rank}, event {place}: {fault}" for fault in faults)

    def computes(self, ops: tuple[Op, ...]) -> Iterator[str]:
        if not (len(ops) == 1 or [op.kind for op in ops] == ["F", "B"]):
            yield f"computes {' & '.join(op.kind for op in ops)}, which is neither one operation nor F & B"
        for op in ops:
            if op.kind != "F":
                before = op._replace(kind="I" if op.kind == "W" else "F")
                if before not in self.done:
                    yield f"{op.kind} of {_of(op[1:])} without its {before.kind} before it"
            message = needed(op, self.stages)
            if message is not None and message not in self.at_hand:
                yield f"{op.kind} of {_of(op[1:])} before {_message(message)} is there"
        self.done.update(ops)
        self.at_hand.update(message for message in map(made, ops) if message is not None)

    def exchanges(self, transfers: tuple[Transfer, ...]) -> Iterator[str]:
        received = set()
        for sends, peer, message in transfers:
            kind, direction, stage, _ = message
            maker = self.holder.get((direction, stage))
            user = self.holder.get((direction, stage + (1 if kind == "F" else -1)))
            if (maker, user) != ((self.rank, peer) if sends else (peer, self.rank)):
                what = f"sends {_message(message)} to" if sends else f"receives {_message(message)} from"
                yield f"{what} rank {peer}, but rank {maker} makes it for rank {user}"
            elif sends:
                if message not in self.at_hand:
                    yield f"sends {_message(message)} before it is made"
                if message in self.sent:
                    yield f"sends {_message(message)} twice"
                self.sent.add(message)
            else:
                if message in self.at_hand or message in received:
                    yield f"receives {_message(message)} twice"
                received.add(message)
        self.at_hand |= received


def _of(place: tuple) -> str:
    direction, stage, micro_batch = place
    return f"stage {stage}, micro-batch {micro_batch}" + (f" of direction {direction}" if direction else "")


def _message(message: Message) -> str:
    kind = "activation" if message.kind == "F" else "gradient"
    return f"the {kind} of {_of(message[1:])}"
