"""What this machine has: versions, GPUs, memory, launcher. Looks, and changes nothing."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil

from dsv3_train.runtime.launcher import VARIABLES

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "tokenizers", "tensorboard")


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch can use."""

    name: str
    memory_gib: float
    free_gib: float
    capability: str
    """Compute capability, as 9.0."""


@dataclass(frozen=True)
class Part:
    """An optional library: works here, or why not."""

    works: bool
    note: str
    """Its version where it works (empty if it tells none), else the reason and the fix."""


@dataclass(frozen=True)
class Probe:
    """What `probe` found."""

    versions: dict[str, str | None]
    gpus: list[Gpu]
    parts: dict[str, Part]
    """transformer-engine, fp8-blockwise, deepep, apex, grouped-gemm."""
    cores: int
    """That this process may use."""
    memory_gib: float
    free_memory_gib: float
    launcher: dict[str, str]
    """What torchrun, srun or mpirun set in the environment."""


def probe() -> Probe:
    """Look at this machine. Imports Transformer Engine, apex and DeepEP where they are installed: seconds.

    Not for a process of a run: Megatron-core patched for a CPU has stand-ins of some of these packages.
    """
    memory = psutil.virtual_memory()
    engine = _transformer_engine()
    return Probe(
        versions=versions(),
        gpus=gpus(),
        parts={
            "transformer-engine": engine,
            "fp8-blockwise": _fp8_blockwise(engine),
            "deepep": _module("deep_ep", "build it from github.com/deepseek-ai/DeepEP"),
            "apex": _apex(),
            "grouped-gemm": _module("grouped_gemm", "not needed: Transformer Engine's grouped layers are used"),
        },
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=memory.total / 2**30,
        free_memory_gib=memory.available / 2**30,
        launcher={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def versions() -> dict[str, str | None]:
    """Of Python, the packages, CUDA, NCCL and the GPU driver; None for what is not there."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # with the build's suffix, as +cpu
    found["cuda"] = torch.version.cuda
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None  # type: ignore
    found["driver"] = _driver()
    return found


def gpus() -> list[Gpu]:
    """The GPUs that torch can use here. Starts a CUDA context on each, for their free memory."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(Gpu(properties.name, total / 2**30, free / 2**30, capability))
    return found


def cpu_name() -> str:
    """The processor's model, as the kernel knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # no Linux
    return platform.processor() or platform.machine()


def _driver(told: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    try:
        text = told.read_text(encoding="utf-8")
    except OSError:
        return None
    return next((word for word in text.split() if word[0].isdigit() and "." in word), None)


def _reason(error: BaseException) -> str:
    """The first line says it; loaders add whole paths."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _transformer_engine() -> Part:
    install = "pip install --no-build-isolation 'dsv3-train[gpu]'"
    if find_spec("transformer_engine") is None:
        return Part(False, f"not installed; {install}")
    try:
        import transformer_engine.pytorch

        return Part(True, transformer_engine.__version__)
    except Exception as error:  # its shared libraries fail in many ways: no CUDA, another torch, no build
        return Part(False, f"does not load here ({_reason(error)})")


def _fp8_blockwise(engine: Part) -> Part:
    if not engine.works:
        return Part(False, "needs Transformer Engine")
    try:
        from transformer_engine.pytorch.quantization import check_fp8_block_scaling_support

        works, reason = check_fp8_block_scaling_support()
    except Exception as error:  # without a GPU the look at its capability fails
        return Part(False, _reason(error))
    return Part(works, reason)


def _apex() -> Part:
    build = "NVIDIA's apex is built from github.com/NVIDIA/apex or comes with NVIDIA's containers"
    if find_spec("apex") is None:
        return Part(False, f"not installed; not needed, Transformer Engine has what it gave. {build}")
    try:
        import amp_C  # noqa: F401  its CUDA kernels
        from apex.optimizers import FusedAdam  # noqa: F401
    except Exception as error:
        return Part(
            False, f"no FusedAdam ({_reason(error)}): the package named apex on PyPI is another project. {build}"
        )
    return Part(True, "")


def _module(name: str, how: str) -> Part:
    if find_spec(name) is None:
        return Part(False, f"not installed; {how}")
    try:
        module = __import__(name)
    except Exception as error:
        return Part(False, f"does not load here ({_reason(error)})")
    return Part(True, getattr(module, "__version__", ""))
