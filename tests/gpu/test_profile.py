"""Reports of real traces against torch.profiler's own table of the same run."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from published import published  # noqa: E402

from dsv3_train.profiling.classes import table  # noqa: E402
from dsv3_train.profiling.report import report  # noqa: E402
from dsv3_train.profiling.trace import read  # noqa: E402
from dsv3_train.profiling.work import works  # noqa: E402
from parity import leave_no_trace  # noqa: E402
from traces import own_times  # noqa: E402


def _traced(run, path):
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return profiler, report(works([read(path)], table()))


def _forward_backward():
    model = (
        torch.nn.Sequential(torch.nn.Linear(4096, 8192), torch.nn.GELU(), torch.nn.Linear(8192, 4096)).cuda().bfloat16()
    )
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return lambda: model(x).sum().backward()


def _moe_layers(fp8: str):
    """Forward and backward pass of two of the report's MoE layers, with 8 experts (facts: one rank's share)."""
    from dsv3_train.model.build import build_chunks, in_training_precision
    from dsv3_train.model.config import megatron_config
    from dsv3_train.model.init import initialize

    recipe = published(2, 8, fp8=fp8)
    config = megatron_config(recipe, "cuda")
    (chunk,) = build_chunks(recipe, config)
    initialize(chunk, 1, recipe.model.initializer_range)
    model = in_training_precision(chunk, config)
    tokens = torch.randint(0, recipe.model.vocab_size, (1, 4096), device="cuda")
    places = torch.arange(4096, device="cuda")[None]

    def run() -> None:
        model(tokens, places, None, labels=tokens).mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


@pytest.fixture(scope="module")
def one_rank():
    """Process groups of one rank."""
    from dsv3_train.runtime import distributed

    recipe = published(2, 8)
    distributed.prepare_import("cuda", recipe)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    distributed.start(recipe, "cuda")
    yield
    leave_no_trace()


@pytest.mark.parametrize("what", ["two linears", "MoE layers, BF16", "MoE layers, FP8"])
def test_times_are_those_of_torchs_table(one_rank, tmp_path, what):
    """Kernel by kernel, class by class, and in all."""
    run = _forward_backward() if what == "two linears" else _moe_layers("blockwise" if "FP8" in what else "none")
    profiler, figures = _traced(run, tmp_path / "trace.json")
    ours = own_times(tmp_path / "trace.json")
    on_gpu = torch.autograd.DeviceType.CUDA
    rows = [row for row in profiler.key_averages() if row.device_type == on_gpu]
    theirs = {row.key: row.self_device_time_total / 1e3 for row in rows if row.key in ours}
    assert theirs.keys() == ours.keys()
    for name, ms in ours.items():
        assert ms == pytest.approx(theirs[name], rel=0.01, abs=0.005), name
    (work,) = works([read(tmp_path / "trace.json")], table())
    class_of = {work.text(i): work.classes[work.cls[i]][0] for i in range(len(work.start))}
    by_class: dict[str, float] = {}
    for name, ms in theirs.items():
        by_class[class_of[name]] = by_class.get(class_of[name], 0.0) + ms
    print(what, {row["class"]: (round(row["ms"], 3), round(by_class[row["class"]], 3)) for row in figures["classes"]})
    print(what, figures["unclassified"])
    for row in figures["classes"]:
        assert row["ms"] == pytest.approx(by_class[row["class"]], rel=0.01, abs=0.005)
    busy, total = figures["compute_ms"] + figures["exposed_comm_ms"], sum(theirs.values())
    # With TE's grouped GEMM on several streams the union is less than the sum, and no table has it.
    overlapped = sum(row["ms"] for row in figures["classes"]) - busy
    print(what, {"busy": busy, "table": total, "span": figures["span_ms"], "host-bound": figures["idle"]})
    if len(figures["streams"]) == 1:
        assert busy == pytest.approx(total, rel=0.01)
    assert busy + overlapped == pytest.approx(total, rel=0.01)
    assert busy + figures["idle_ms"] == pytest.approx(figures["span_ms"])
    if what == "two linears":
        assert figures["gemm"]["with_shapes_ms"] > 0.9 * figures["gemm"]["ms"]
        assert 100 < figures["gemm"]["tflops"] < 2500


def test_an_exposed_copy_on_the_compute_stream_is_named(tmp_path):
    step, held = _forward_backward(), torch.empty(1 << 28, device="cuda")

    def run() -> None:
        step()
        held.cpu()

    _, figures = _traced(run, tmp_path / "trace.json")
    assert any(one["kind"] == "exposed copy" and "DtoH" in one["text"] for one in figures["findings"])


def test_waiting_for_the_host_is_named(tmp_path):
    step = _forward_backward()

    def run() -> None:
        step()
        torch.cuda.synchronize()
        sum(range(2_000_000))  # the host is busy, the GPU is not

    _, figures = _traced(run, tmp_path / "trace.json")
    assert figures["idle"]["host_bound_ms"] > 0.8 * figures["idle_ms"]
    assert any(one["kind"] == "host-bound" for one in figures["findings"])
