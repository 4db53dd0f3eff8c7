"""The study of imbalanced tokens: known errors, and what the report found."""

from __future__ import annotations

import pytest
import torch

from dsv3_train.numerics.imbalance import DECADES, Errors, imbalanced, reference, study
from dsv3_train.precision.formats import E4M3
from dsv3_train.precision.reference import BLOCK, TILE


def exact(x: torch.Tensor) -> torch.Tensor:
    return x


def test_known_errors():
    assert study(exact, exact, decades=[6]) == [Errors(6, 0.0, 0.0, 0.0, 0.0)]
    (tenth,) = study(lambda x: x.double() * 1.1, exact, decades=[3])
    assert [tenth.operand, tenth.median, tenth.p95] == pytest.approx([0.1] * 3)
    assert tenth.lost == 0


def test_a_token_counts_whatever_its_size():
    """One token in ten is lost, the smallest: the whole matrix hardly shows it, the percentile does."""

    def forget(x_to: torch.Tensor) -> torch.Tensor:
        norm_t = x_to.float().norm(dim=1)
        return x_to * (norm_t > norm_t.quantile(0.1))[:, None]

    (errors,) = study(forget, exact, decades=[6])
    assert errors.operand < 1e-5
    assert errors.lost == pytest.approx(0.1, abs=0.002)
    assert (errors.median, errors.p95) == (0, 1)


def test_the_data_is_what_it_says():
    gradient_to, weight_oi = imbalanced(4)
    assert gradient_to.dtype == weight_oi.dtype == torch.bfloat16
    size_t = gradient_to.float().pow(2).mean(dim=1).sqrt().log10()
    assert (size_t.min().item(), size_t.max().item()) == pytest.approx((-4, 0), abs=0.1)
    assert size_t.mean().item() == pytest.approx(-2, abs=0.15)
    assert weight_oi.float().std().item() == pytest.approx(0.006, rel=0.02)
    assert torch.equal(imbalanced(0)[0].sign(), gradient_to.sign())


def test_tiles_of_single_tokens_alone_survive_six_decades():
    rows = study(reference(TILE, E4M3))
    assert [row.decades for row in rows] == list(DECADES)
    assert all(row.p95 == pytest.approx(0.042, abs=0.002) and row.lost == 0 for row in rows)
    for shared in (BLOCK, None):
        rows = study(reference(shared, E4M3))
        assert all(row.p95 == pytest.approx(0.042, abs=0.002) for row in rows[:4])  # nothing to see up to 3 decades
        assert rows[6].p95 > 0.95
        assert rows[6].lost > 0.1
        assert rows[6].operand < 0.03  # the norm of the whole matrix is blind to it
