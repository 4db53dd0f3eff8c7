"""Record what DeepSeek's published DualPipe and DualPipeV do, for tests/test_pipeline_schedules.py to compare with.

    git clone https://github.com/deepseek-ai/DualPipe
    python tools/record_dualpipe.py DualPipe tests/reference/dualpipe.json

Runs the published classes as they are, one rank at a time on a CPU. Stand-ins for what they call: a stage of one weight
that notes its forwards and backwards; transfers that are noted and carry nothing. Small cases are written out, of the
others a digest.

Per rank the events in order: `F0.3` is the forward of micro-batch 3 through the chunk that the class stores under 0;
`F0.3&B1.1` an overlapped pair; `>2:F0.3` in an exchange sends that forward's output to rank 2, `<2:B0.3` receives the
gradient for it from rank 2.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

WRITTEN_OUT = [("dualpipe", 2, 4), ("dualpipe", 4, 10), ("dualpipev", 1, 2), ("dualpipev", 2, 5), ("dualpipev", 3, 7)]
CASES = [
    *(("dualpipe", p, m) for p in (2, 4, 6, 8, 10, 12, 16) for m in (2 * p, 2 * p + 2, 3 * p, 4 * p, 5 * p + 2)),
    *(("dualpipev", p, m) for p in (1, 2, 3, 4, 5, 6, 8, 12, 16) for m in (2 * p, 2 * p + 1, 3 * p, 4 * p, 5 * p + 3)),
]


class Notes:
    """Events of the rank that runs now."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.transfer = ""

    def pair(self) -> None:
        backward, forward = self.events.pop(), self.events.pop()
        self.events.append(f"{forward}&{backward}")


notes = Notes()


def stand_ins() -> type:
    """Put stand-ins for transfers into the imported package; returns the stage class."""
    comm = sys.modules["dualpipe.comm"]
    store = sys.modules["dualpipe.utils"].WeightGradStore
    run_backward = sys.modules["dualpipe.utils"].run_backward

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, name):
            ctx.name = name
            notes.events.append(f"F{name}")
            return x * weight

        @staticmethod
        def backward(ctx, gradient):
            name = ctx.name
            notes.events.append(f"{'I' if store.enabled else 'B'}{name}")
            if store.enabled:
                store.put(lambda: notes.events.append(f"W{name}"))
            return gradient, torch.zeros(1), None

    class Stage(torch.nn.Module):
        def __init__(self, chunk: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.chunk, self.count = chunk, 0

        def forward(self, x):
            self.count += 1
            return Noted.apply(x, self.weight, f"{self.chunk}.{self.count - 1}")

        @classmethod
        def overlapped_forward_backward(cls, module0, inputs0, criterion0, labels0, _, loss1, outputs1, gradients1):
            outputs = [module0(*inputs0)]
            loss = criterion0(*outputs, *labels0) if criterion0 is not None else None
            if loss1 is not None:
                loss1.backward()
                loss1.detach_()
            else:
                run_backward(outputs1, gradients1)
            notes.pair()
            return outputs, loss

    def receive(ops, source, group):
        ops.append(f"<{source}:{notes.transfer}")
        return [torch.ones(1, 1, requires_grad=True)]

    def send(ops, tensors, target, group):
        ops.append(f">{target}:{notes.transfer}")

    comm.append_irecv, comm.append_isend = receive, send
    comm.TENSOR_SHAPES, comm.TENSOR_DTYPE = [(1, 1)], torch.float32
    return Stage


def named_transfers(published: type) -> type:
    """The class with its four transfers announcing which chunk and micro-batch they are for."""

    def announced(method: str, kind: str, counter: str):
        original = getattr(published, method)

        def transfer(self, phase):
            chunk = phase ^ getattr(self, "is_in_second_half", 0)
            notes.transfer = f"{kind}{chunk}.{getattr(self, counter)[chunk]}"
            original(self, phase)

        return transfer

    return type(
        published.__name__,
        (published,),
        {
            "_recv_forward": announced("_recv_forward", "F", "current_recv_f_chunk_id"),
            "_send_forward": announced("_send_forward", "F", "current_send_f_chunk_id"),
            "_recv_backward": announced("_recv_backward", "B", "current_recv_b_chunk_id"),
            "_send_backward": announced("_send_backward", "B", "current_send_b_chunk_id"),
        },
    )


def record(published: type, stage: type, kind: str, ranks: int, micro_batches: int) -> list[list[str]]:
    """Events of every rank."""
    lists = []
    for rank in range(ranks):
        notes.events = []
        group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        pipeline = published((stage(0), stage(1)), process_group=group)
        fed = micro_batches // 2 if kind == "dualpipe" else micro_batches
        ends = rank == 0 or (kind == "dualpipe" and rank == ranks - 1)
        batch = torch.ones(fed, 1)
        pipeline.step(
            *([batch] if ends else []),
            num_chunks=micro_batches,
            criterion=lambda output, label: output.sum(),
            labels=[batch] if ends else [],
        )
        lists.append(notes.events)
    return lists


def digest(lists: list[list[str]]) -> str:
    return hashlib.sha256("\n".join(" ".join(events) for events in lists).encode()).hexdigest()


def main(checkout: str, target: str) -> None:
    sys.path.insert(0, checkout)
    import dualpipe

    stage = stand_ins()
    torch.cuda.current_device = lambda: "cpu"
    dist.batch_isend_irecv = lambda ops: notes.events.append("[" + ",".join(ops) + "]") or []
    classes = {"dualpipe": named_transfers(dualpipe.DualPipe), "dualpipev": named_transfers(dualpipe.DualPipeV)}
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "source": "https://github.com/deepseek-ai/DualPipe",
        "commit": commit,
        "lists": {" ".join(map(str, case)): record(classes[case[0]], stage, *case) for case in WRITTEN_OUT},
        "digests": {" ".join(map(str, case)): digest(record(classes[case[0]], stage, *case)) for case in CASES},
    }
    Path(target).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(WRITTEN_OUT)} lists and {len(CASES)} digests of {commit} -> {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
