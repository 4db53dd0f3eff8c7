"""AdamW over many tensors in one launch; each value is read and written once.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w (1 - lr decay) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

Moments of any floating type are taken to FP32 in registers. Transformer Engine's FusedAdam makes FP32 copies of BF16
moments, three kernels a tensor. The plain PyTorch that this stands for is optim/adamw.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_CHUNK, _BLOCK = 16384, 1024


class Tensors:
    """Addresses of tensors of one kind, and their division in chunks, on the GPU; made anew when a tensor moves."""

    def __init__(self) -> None:
        self._known: list[int] = []
        self._table: torch.Tensor | None = None
        self._chunks: torch.Tensor | None = None
        self._aligned = False

    def update(self, rows: Sequence[Sequence[torch.Tensor]], *, lr: float, betas: tuple[float, float], eps: float,
               weight_decay: float, step: int) -> None:  # fmt: skip
        """One step of all tensors.

        Args:
            rows: per tensor its weight, gradient, two moments and, where weights are BF16, FP32 master: all contiguous,
                of one number of elements; each column of one type.
        """
        addresses = [x.data_ptr() for row in rows for x in row] + [row[0].numel() for row in rows]
        if self._table is None or addresses != self._known:
            self._fill(rows)
            self._known = addresses
        assert self._table is not None
        assert self._chunks is not None
        weight, gradient, moment, second, *master = (x.dtype for x in rows[0])
        assert moment == second
        assert all(dtype == torch.float32 for dtype in master)
        _adam[(self._chunks.size(0),)](
            self._table, self._chunks, lr, *betas, 1 - betas[0], 1 - betas[1], eps, 1 - lr * weight_decay,
            1 / (1 - betas[0] ** step), 1 / (1 - betas[1] ** step),
            WEIGHT=_TYPES[weight], GRADIENT=_TYPES[gradient], MOMENT=_TYPES[moment], MASTER=bool(master),
            ALIGNED=self._aligned, COLUMNS=len(rows[0]), CHUNK=_CHUNK, BLOCK=_BLOCK,
        )  # fmt: skip

    def _fill(self, rows: Sequence[Sequence[torch.Tensor]]) -> None:
        device = rows[0][0].device
        for row in rows:
            if len({x.numel() for x in row}) > 1 or not all(x.is_contiguous() for x in row):
                raise ValueError("a weight, its gradient and its moments differ in size, or are not contiguous")
        table = [[*(x.data_ptr() for x in row), row[0].numel()] for row in rows]
        chunks = [(i, at) for i, row in enumerate(rows) for at in range(triton.cdiv(row[0].numel(), _CHUNK))]
        self._aligned = all(value % 16 == 0 for values in table for value in values)
        self._table = torch.tensor(table, dtype=torch.int64).to(device)
        self._chunks = torch.tensor(chunks, dtype=torch.int32).to(device)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def _adam(
    table_ptr, chunks_ptr, lr, beta1, beta2, rest1, rest2, eps, keep, correction1, correction2,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, MOMENT: tl.constexpr, MASTER: tl.constexpr,
    ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    own = table_ptr + tensor * (COLUMNS + 1)
    weight, gradient, moment, second = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
    size = tl.load(own + COLUMNS)
    if ALIGNED:  # shards of ZeRO-1 may begin anywhere
        weight, gradient = tl.multiple_of(weight, 16), tl.multiple_of(gradient, 16)
        moment, second, size = tl.multiple_of(moment, 16), tl.multiple_of(second, 16), tl.multiple_of(size, 16)
    weight_ptr, gradient_ptr = weight.to(tl.pointer_type(WEIGHT)), gradient.to(tl.pointer_type(GRADIENT))
    moment_ptr, second_ptr = moment.to(tl.pointer_type(MOMENT)), second.to(tl.pointer_type(MOMENT))
    master_ptr = weight_ptr
    if MASTER:
        master = tl.load(own + 4)
        master_ptr = (tl.multiple_of(master, 16) if ALIGNED else master).to(tl.pointer_type(tl.float32))
    for at in range(0, CHUNK, BLOCK):
        place = start + at + tl.arange(0, BLOCK)
        there = place < size
        g = tl.load(gradient_ptr + place, there, other=0.0).to(tl.float32)
        m = beta1 * tl.load(moment_ptr + place, there, other=0.0).to(tl.float32) + rest1 * g
        v = beta2 * tl.load(second_ptr + place, there, other=0.0).to(tl.float32) + rest2 * g * g
        w = tl.load(master_ptr + place, there, other=0.0).to(tl.float32)
        w = w * keep - lr * (m * correction1) / (tl.sqrt(v * correction2) + eps)
        tl.store(moment_ptr + place, m.to(MOMENT), there)
        tl.store(second_ptr + place, v.to(MOMENT), there)
        tl.store(weight_ptr + place, w.to(WEIGHT), there)
        if MASTER:
            tl.store(master_ptr + place, w, there)
