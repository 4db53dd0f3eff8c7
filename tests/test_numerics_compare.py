"""Comparison of losses: known answers, what is matched with what, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numeric_runs import TOKENS, falling, line, run_dir, steps

from dsv3_train.errors import UserError
from dsv3_train.numerics.compare import compare, smooth
from dsv3_train.numerics.series import read
from dsv3_train.numerics.table import verdicts

FP8 = "precision.fp8=emulated"


@pytest.fixture
def base(tmp_path):
    return run_dir(tmp_path / "base", steps(falling()))


def against(base, lines, *overrides, window=None, seeds=(), name="run"):
    """Figures of one run beside the baseline."""
    other = run_dir(base.parent / name, lines, *(overrides or (FP8,)))
    figures, curves = compare(base, [other], seeds, window=window)
    return figures["runs"][0], figures, curves


def test_smoothing():
    assert smooth(np.array([1.0, 2.0, 4.0]), None).tolist() == pytest.approx([1.0, 1.1, 1.39])
    assert smooth(np.array([1.0, 3.0, 8.0, 4.0]), 2).tolist() == pytest.approx([np.nan, 2.0, 5.5, 6.0], nan_ok=True)
    assert smooth(np.array([1.0, 3.0]), 1).tolist() == [1.0, 3.0]
    assert smooth(np.array([np.nan, 1.0, np.nan, 2.0]), None).tolist() == pytest.approx(
        [np.nan, 1.0, 1.0, 1.1], nan_ok=True
    )


@pytest.mark.parametrize("window", [1, 2, 3, 5, 12, 13])
def test_a_nan_is_in_the_windows_that_hold_it(window):
    x_n = np.array([1.0, 3.0, np.nan, 4.0, 1e20, 5.0, 9.0, 2.0, 6.0, np.nan, 3.0, 5.0])
    expected = [x_n[i - window + 1 : i + 1].mean() if i >= window - 1 else np.nan for i in range(len(x_n))]
    assert smooth(x_n, window).tolist() == pytest.approx(expected, nan_ok=True, rel=1e-12)


@pytest.mark.parametrize("window", [None, 1, 7, 21])
@pytest.mark.parametrize(("factor", "within"), [(1.002, True), (0.998, True), (1.003, False), (0.997, False)])
def test_a_constant_factor_is_found_with_its_sign(base, factor, within, window):
    run, figures, curves = against(base, steps(falling() * factor), window=window)
    for of in (run["loss"], run["mtp_loss"]):
        assert of["max_abs"] == pytest.approx(abs(factor - 1))
        assert [of["mean"], of["last"]] == pytest.approx([factor - 1] * 2)
        assert of["unsmoothed_max_abs"] == pytest.approx(abs(factor - 1))
    assert run["within_bound"] is within
    assert ("misses 0.25% by 0.050 points" in run["verdict"]) is not within
    assert run["mean_loss"] == pytest.approx(falling()[20:].mean() * factor)
    assert figures["steps"] == {"compared": 40, "first": 1, "last": 40, "last_half_from": 21}
    assert curves.tokens_n.tolist() == [TOKENS * step for step in range(1, 41)]


def test_runs_of_other_seeds_stand_against_the_baseline_of_theirs(base):
    other = run_dir(base.parent / "base2", steps(falling() * 1.1), "training.seed=2")
    one = run_dir(base.parent / "run", steps(falling() * 1.003), FP8)
    two = run_dir(base.parent / "run2", steps(falling() * 1.1 * 0.999), FP8, "training.seed=2")
    figures, _ = compare(base, [one, two], [other])
    assert [run["loss"]["mean"] for run in figures["runs"]] == pytest.approx([0.003, -0.001])
    assert [run["against"] for run in figures["runs"]] == [str(base), str(other)]
    assert figures["spread"]["max_abs"] == pytest.approx(0.1)  # of the baseline's seeds alone
    (group,) = figures["over_seeds"]
    assert group["runs"] == ["run", "run2"]
    assert group["mean"] == pytest.approx(0.001)
    assert group["error"] == pytest.approx(0.002)  # 0.004 / sqrt(2) / sqrt(2)
    assert "+0.100% on the mean of the last half, standard error over 2 seeds 0.20%" in verdicts(figures)[-1]


@pytest.mark.parametrize("more", [(), ("training.recompute=[moe_act]",)], ids=["again", "another setting"])
def test_runs_of_one_seed_have_no_error(base, more):
    one = run_dir(base.parent / "run", steps(falling()), FP8)
    two = run_dir(base.parent / "run2", steps(falling() * 1.01), FP8, *more)
    figures, _ = compare(base, [one, two])
    assert figures["over_seeds"] == []


def test_settings_that_seeds_do_not_share_are_told_apart(base):
    """FP8 with one seed and FP8 with recomputation with another are no two seeds of anything."""
    other = run_dir(base.parent / "base2", steps(falling()), "training.seed=2")
    one = run_dir(base.parent / "run", steps(falling()), FP8)
    two = run_dir(base.parent / "run2", steps(falling()), FP8, "training.seed=2", "training.recompute=[moe_act]")
    figures, _ = compare(base, [one, two], [other])
    assert figures["over_seeds"] == []


@pytest.mark.parametrize(("count", "first"), [(40, 21), (41, 21), (42, 22)])
def test_the_last_half_begins_where_it_should(tmp_path, count, first):
    base = run_dir(tmp_path / "base", steps(falling(count)))
    for step, expected in ((first - 1, 0.0), (first, 0.1)):
        losses = falling(count)
        losses[step - 1] *= 1.1
        run, figures, _ = against(base, steps(losses), window=1, name=f"at{step}")
        assert figures["steps"]["last_half_from"] == first
        assert run["loss"]["max_abs"] == pytest.approx(expected, abs=1e-12)
        if expected:
            assert run["loss"]["max_abs_at_step"] == first


def test_the_largest_difference_may_be_negative(base):
    losses = falling()
    losses[24] *= 1.01
    losses[30] *= 0.98
    run, _, _ = against(base, steps(losses), window=1)
    assert run["loss"]["max_abs"] == pytest.approx(0.02)
    assert run["loss"]["max_abs_at_step"] == 31
    assert run["loss"]["mean"] == pytest.approx((0.01 - 0.02) / 20)
    assert run["loss"]["last"] == 0


def test_smoothed_losses_are_compared_not_differences_smoothed(base):
    losses = falling()
    losses[29] *= 2
    run, _, _ = against(base, steps(losses), window=4)
    with_it = [losses[i : i + 4].sum() / falling()[i : i + 4].sum() - 1 for i in range(26, 30)]
    assert run["loss"]["max_abs"] == pytest.approx(max(with_it))
    assert run["loss"]["max_abs_at_step"] == 30 + int(np.argmax(with_it))
    assert run["loss"]["unsmoothed_max_abs"] == pytest.approx(1.0)


def test_the_later_attempt_counts(base):
    """Steps 1 to 30, back to 26, passed over 28, to the end; and a validation of the first attempt at 30."""
    first = steps(falling() * 1.5)[:30]
    first[:25] = steps(falling())[:25]
    lost = {"kind": "validation", "step": 30, "consumed_tokens": 30 * TOKENS, "loss": 9.0}
    second = steps(falling())[25:]
    second[2] = {"kind": "passed over", "step": 28, "consumed_tokens": 28 * TOKENS, "first_sample": 0, "batch_size": 8}
    run, figures, _ = against(base, [*first, lost, *second], window=1)
    assert figures["steps"]["compared"] == 39
    assert run["loss"]["max_abs"] == 0
    assert read(base.parent / "run").validation == {}
    assert "batches passed over at step 28" in " ".join(run["notes"])


def test_a_later_attempt_that_got_less_far(base):
    """40 steps, then again from 31 to 35, where it stands: what the first attempt did from there on is gone."""
    valid = {"kind": "validation", "step": 35, "consumed_tokens": 35 * TOKENS, "loss": 9.0}
    first = [*steps(falling() * 2)[:35], valid, *steps(falling() * 2)[35:]]
    first[:30] = steps(falling())[:30]
    run, figures, _ = against(base, [*first, *steps(falling())[30:35]], window=1)
    assert (figures["steps"]["last"], run["loss"]["max_abs"]) == (35, 0)
    again = run_dir(base.parent / "again", [*steps(falling())[:35], valid, steps(falling())[34]])
    assert read(again).validation == {}


def test_steps_are_matched_by_number(base):
    lines = [one for one in steps(falling()) if one["step"] not in (5, 25, 33)]
    run, figures, curves = against(base, lines, window=1)
    assert figures["steps"] == {"compared": 37, "first": 1, "last": 40, "last_half_from": 20}
    assert run["loss"]["max_abs"] == 0
    assert len(curves.tokens_n) == 37
    assert 25 * TOKENS not in curves.tokens_n


def test_spread_of_seeds(base):
    seeds = [
        run_dir(base.parent / f"seed{number}", steps(falling() * factor), f"training.seed={number}")
        for number, factor in ((1, 1.01), (2, 0.96))
    ]
    run, figures, curves = against(base, steps(falling() * 1.02), seeds=seeds)
    assert [seed["seed"] for seed in figures["seeds"]] == [1, 2]
    assert [seed["loss"]["mean"] for seed in figures["seeds"]] == pytest.approx([0.01, -0.04])
    assert figures["spread"]["seeds"] == 3
    assert figures["spread"]["max_abs"] == pytest.approx(0.04)
    # of 1, 1.01 and 0.96, over their mean 0.99; n - 1 = 2 below
    assert figures["spread"]["mean_loss_std"] == pytest.approx(((0.01**2 + 0.02**2 + 0.03**2) / 2) ** 0.5 / 0.99)
    assert run["differs"] == {"precision.fp8": ["none", "emulated"]}
    assert [len(side) for side in (curves.runs, curves.seeds)] == [1, 2]


def test_gradient_norms_and_validation(base):
    valid = [
        {"kind": "validation", "step": step, "consumed_tokens": step * TOKENS, "loss": loss}
        for step, loss in ((10, 5.0), (20, 4.0))
    ]
    base = run_dir(base.parent / "other base", [*steps(falling(), grad_norm=2.0), *valid])
    lines = [line(step, float(falling()[step - 1]), grad_norm=2.0 if step <= 20 else 3.0) for step in range(1, 41)]
    more = [{**valid[0], "loss": 9.0}, {**valid[1], "loss": 4.2}, {**valid[1], "step": 30, "loss": 1.0}]
    run, _, _ = against(base, [*lines, *more])
    assert run["grad_norm_ratio"] == pytest.approx(1.5)
    assert run["validation"] == {"step": 20, "loss": 4.2, "baseline": 4.0, "difference": pytest.approx(0.05)}
    seeds = [run_dir(base.parent / key, [*lines, *more], f"{key}=5") for key in ("training.seed", "data.seed")]
    figures, _ = compare(base, [], seeds)
    # Of another order of the text, others come first.
    assert [one["validation"] is None for one in figures["seeds"]] == [False, True]


def test_a_model_without_mtp(tmp_path):
    overrides = ["model.num_nextn_predict_layers=0", "schedule.mtp_weight=0"]
    base = run_dir(tmp_path / "base", steps(falling(), mtp_loss=None), *overrides)
    run, _, _ = against(base, steps(falling(), mtp_loss=None), *overrides, FP8)
    assert run["mtp_loss"] is None


def test_losses_that_are_not_finite(base):
    losses = [*falling()[:30], None, *falling()[31:]]
    run, figures, _ = against(base, steps(losses))
    assert (run["loss"]["max_abs"], run["within_bound"]) == (pytest.approx(0), False)
    assert "not finite" in run["verdict"]
    assert f"{base.parent / 'run'}: no finite loss at step 31" in run["notes"]
    assert figures["steps"]["compared"] == 39
    seed = run_dir(base.parent / "seed", steps(losses), "training.seed=3")
    for name, arguments in (("run", (base.parent / "run", [base])), ("seed", (base, [], [seed]))):
        with pytest.raises(UserError, match=rf"{name}/metrics\.jsonl: the loss of step 31 is not finite"):
            compare(*arguments)


def test_a_run_that_is_not_at_its_end_is_told_of(base):
    run, _, _ = against(base, steps(falling()[:30]))
    assert run["within_bound"] is True
    assert "so far: step 30 of 40" in run["verdict"]


@pytest.mark.parametrize(
    "free",
    ["parallel.world_size=2", "training.micro_batch_size=4", "training.recompute=[moe_act]", "logging.interval=7",
     "checkpoint.interval=5", "name=other", "data.workers=0", "training.eval_interval=3", "runtime.deterministic=true",
     "faults.max_restarts=1"],
)  # fmt: skip
def test_what_may_differ(base, free):
    run, _, _ = against(base, steps(falling()), free)
    assert run["within_bound"] is True


@pytest.mark.parametrize(
    "override",
    ["model.moe_intermediate_size=64", "schedule.batch_size=16", "schedule.balance_loss=0",
     "training.duration=90 steps", "training.sequence_length=64", "data.valid_fraction=0.5", "optim.eps=1e-9",
     "training.seed=5", "data.seed=5", "checkpoint.load=elsewhere", 'faults.skip_samples=["3-5"]',
     "training.eval_sequences=8"],
)  # fmt: skip
def test_what_may_not_differ(base, override):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"^{base.parent}/run: {key} is .*, and .* in {base}; [^\n]*$"):
        against(base, steps(falling()), override)


def test_seeds_are_of_the_baseline(base):
    run = run_dir(base.parent / "run", steps(falling()), FP8)
    for name, overrides, why in (
        ("same", [], "same seeds"),
        ("fp8", [FP8, "training.seed=3"], "precision.fp8"),
        ("model", ["training.seed=3", "optim.eps=1e-9"], "optim.eps"),
    ):
        seed = run_dir(base.parent / name, steps(falling()), *overrides)
        with pytest.raises(UserError, match=f"{name}: .*{why}"):
            compare(base, [run], [seed])


@pytest.mark.parametrize("more", [1, -1])
def test_batches_of_other_sizes_are_refused(base, more):
    lines = [one | {"consumed_tokens": one["consumed_tokens"] + more * (one["step"] > 8)} for one in steps(falling())]
    with pytest.raises(UserError, match=f"{9 * TOKENS + more} tokens consumed after step 9, and {9 * TOKENS} in"):
        against(base, lines)


def test_a_run_that_changed_on_the_way_is_refused(base):
    run = run_dir(base.parent / "run", steps(falling()), FP8)
    earlier = run / "recipe-before-step_00000000.yaml"  # of an attempt that left nothing
    earlier.write_text((base / "recipe.yaml").read_text())
    compare(base, [run])
    earlier.rename(run / "recipe-before-step_00000010.yaml")
    with pytest.raises(UserError, match=r"step_00000010.yaml: precision.fp8 was 'none' up to step 10, then 'emulated'"):
        compare(base, [run])


def test_what_is_no_run(tmp_path, base):
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = run_dir(tmp_path / "bare", [])
    few = run_dir(tmp_path / "few", steps(falling()[:19]))
    for path, why in (
        (tmp_path / "none", "no run of `dsv3 train`"),
        (empty, "no recipe.yaml"),
        (bare, "holds no step"),
        (few, "few: 19 steps with a finite loss, 19 of them in every run; at least 20"),
        (base, "given twice"),
    ):
        with pytest.raises(UserError, match=why) as caught:
            compare(base, [path])
        assert "\n" not in str(caught.value)
    (bare / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="has not trained a step"):
        compare(base, [bare])


@pytest.mark.parametrize(
    "damage",
    ['{"kind": "step"', "[]", '{"step": 3}', json.dumps(line(3, -1.0)), json.dumps(line(3, 0.0)),
     json.dumps(line(3, 2.0, consumed_tokens="x")), json.dumps({**line(3, 2.0), "step": True})],
)  # fmt: skip
def test_damaged_metrics(tmp_path, base, damage):
    run = run_dir(tmp_path / "run", steps(falling()), FP8)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines, damage]))
    compare(base, [run])  # the last line may be half-written
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], damage, *lines[3:]]))
    with pytest.raises(UserError, match=r"metrics.jsonl:3: no line of `dsv3 train` \(.*\); mend or remove it$"):
        compare(base, [run])


@pytest.mark.parametrize("window", [0, -1, 22, 1000])
def test_windows_that_do_not_fit(base, window):
    with pytest.raises(UserError, match=f"--window: {window} steps, and 40 are compared; set 1 to 21"):
        against(base, steps(falling()), window=window)
