"""Reports of real traces against torch.profiler's own table of the same run."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from dsv3_train.profiling.classes import table  # noqa: E402
from dsv3_train.profiling.report import report  # noqa: E402
from dsv3_train.profiling.trace import read  # noqa: E402
from dsv3_train.profiling.work import works  # noqa: E402
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


def test_kernel_times_are_those_of_torchs_table(tmp_path):
    profiler, figures = _traced(_forward_backward(), tmp_path / "trace.json")
    ours = own_times(tmp_path / "trace.json")
    on_gpu = torch.autograd.DeviceType.CUDA
    theirs = {row.key: row.self_device_time_total / 1e3 for row in profiler.key_averages() if row.device_type == on_gpu}
    for name, ms in ours.items():
        assert ms == pytest.approx(theirs[name], rel=0.01, abs=0.005), name
    # One stream: its union is the sum of its kernels.
    assert figures["compute_ms"] + figures["exposed_comm_ms"] == pytest.approx(sum(ours.values()), rel=0.01)
    assert figures["compute_ms"] + figures["exposed_comm_ms"] + figures["idle_ms"] == pytest.approx(figures["span_ms"])
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
