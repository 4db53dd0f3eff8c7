"""The parts of a corpus, in order, to one indexed dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_train.data import blocks, index
from dsv3_train.data.shard import Part, Work

_TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Merged:
    """The two files, under temporary names, and what was seen of the tokens on the way."""

    bin: Path
    idx: Path
    bin_sha256: str
    idx_sha256: str
    bin_blocks: list[str]
    """See data/blocks.py."""
    max_token: int
    unigram_entropy: float
    """Nats per token."""


def merge(results: Sequence[Part], work: Work, vocab_size: int, progress: Callable[[str, int, int], None]) -> Merged:
    """Write `merged.bin` and `merged.idx` beside the parts."""
    parts, dtype = Path(work.parts), np.dtype(work.dtype)
    out_bin, out_idx = parts / "merged.bin", parts / "merged.idx"
    total = sum(part.tokens for part in results) * dtype.itemsize
    digest, done = hashlib.sha256(), 0
    counts = np.zeros(vocab_size, np.int64)
    lengths = []
    with open(out_bin, "wb") as out:
        for number in range(len(results)):
            for tokens in _read(parts / f"{number:06d}.bin", dtype):
                raw = tokens.tobytes()
                digest.update(raw)
                out.write(raw)
                counts += np.bincount(tokens, minlength=vocab_size)
                done += len(raw)
            lengths.append(np.load(parts / f"{number:06d}.npy", allow_pickle=False))
            progress("merging", done, total)
    index.write(out_idx, dtype, np.concatenate(lengths))
    shares = counts[counts > 0] / counts.sum()
    with open(out_idx, "rb") as file:
        idx_digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            idx_digest.update(chunk)
    return Merged(
        bin=out_bin,
        idx=out_idx,
        bin_sha256=digest.hexdigest(),
        idx_sha256=idx_digest.hexdigest(),
        bin_blocks=blocks.digests(out_bin),
        max_token=int(counts.nonzero()[0][-1]),
        unigram_entropy=float(-(shares * np.log(shares)).sum()),
    )


def _read(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while (tokens := np.fromfile(file, dtype, _TOKENS_AT_ONCE)).size:
            yield tokens
