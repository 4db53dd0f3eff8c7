"""Everything that Megatron-core needs to run on a machine without a GPU.

Megatron-core runs over gloo as it is, but for the places below where it takes CUDA, or Transformer
Engine, for granted. Each function is one patch and says why it exists. `install` applies them all; it
must run before Megatron-core is first imported, and refuses to run on a machine with a GPU.
`tests/test_cpu_patches.py` takes each patch away and shows what fails, so that a patch that upstream no
longer needs makes itself known.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import types
from collections.abc import Callable, Collection

import torch
import torch.distributed as dist

from dsv3_train.errors import UserError
from dsv3_train.runtime import megatron_versions

_CPU = torch.device("cpu")


def current_device() -> None:
    """Megatron passes `device=torch.cuda.current_device()` to nearly every allocation."""
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]


def device_argument() -> None:
    """Some allocations name `device="cuda"` outright (schedules.py, clip_grads.py, optimizer.py)."""

    def on_cpu(create: Callable) -> Callable:
        @functools.wraps(create)
        def create_on_cpu(*args, **kwargs):
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = _CPU
            return create(*args, **kwargs)

        return create_on_cpu

    # `with torch.device("meta")` lists the functions that it directs when it first needs them: these, not the ones
    # below, by which a router's weight would be real memory in `on_meta`.
    importlib.import_module("torch.utils._device")._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def to_cuda() -> None:
    """The copy of the embedding on MTP's stage is filled through `.cuda()` (language_module.py)."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore


class _Event:
    """An event on the one in-order queue that a CPU is: always reached."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def record(self, *args) -> None:
        pass

    wait = synchronize = record

    def query(self) -> bool:
        return True


class _Stream:
    """A stream on a CPU: there is one queue, in order, so waiting is done already."""

    device = _CPU
    cuda_stream = 0

    def __init__(self, *args, **kwargs) -> None:
        pass

    def wait_stream(self, *args) -> None:
        pass

    wait_event = synchronize = wait_stream

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


def streams() -> None:
    """The token dispatcher and the overlapped schedules make CUDA streams and events."""
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event  # type: ignore[misc,assignment]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args, **kwargs: _Stream()  # type: ignore
    torch.cuda.stream = lambda stream=None: contextlib.nullcontext()  # type: ignore


def synchronize() -> None:
    """A save waits for the copies of what it will write (filesystem_async.py)."""
    torch.cuda.synchronize = lambda *args, **kwargs: None  # type: ignore[assignment]


def ranges() -> None:
    """The schedule plan of overlapped passes names its parts for NVIDIA's profilers (pipeline_parallel/utils.py)."""
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: None  # type: ignore[assignment]


def record_stream() -> None:
    """It also tells the allocator which streams use a tensor; a CPU tensor takes no dummy stream."""
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment,method-assign]


def random_state() -> None:
    """Megatron keeps one random state per kind of parallelism, in the CUDA generator."""
    # Not torch.manual_seed: that calls torch.cuda.manual_seed_all, which comes back here.
    torch.cuda.manual_seed = torch.default_generator.manual_seed  # type: ignore[assignment]
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()  # type: ignore[attr-defined]
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)  # type: ignore[attr-defined]


def tensor_type() -> None:
    """The optimizers sort parameters by the string `torch.cuda.FloatTensor` (clip_grads.py, distrib_optimizer.py)."""
    plain = torch.Tensor.type

    def cuda_type(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return plain(self, dtype, *args, **kwargs)
        return plain(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type  # type: ignore[assignment,method-assign]


def keep_sent_tensor() -> None:
    """Megatron frees a sent activation by swapping its `.data` while gloo may still be reading it.

    Silent wrong losses with virtual stages and overlapped point-to-point messages otherwise; a detached
    alias keeps the storage. (NCCL has its own copy in stream order.)
    """
    isend = dist.isend

    def isend_alias(tensor, *args, **kwargs):
        return isend(tensor.detach(), *args, **kwargs)

    dist.isend = dist.distributed_c10d.isend = isend_alias  # type: ignore[attr-defined]


def no_te() -> None:
    """Installed here or not, Transformer Engine's and apex's kernels need a GPU; Megatron takes them where it can."""
    for name in ("transformer_engine", "transformer_engine_torch", "apex"):
        sys.modules[name] = None  # type: ignore[assignment]


def no_compile() -> None:
    """Megatron compiles small functions as it is imported: seconds, and a C++ compiler, for nothing on a CPU."""

    def leave(function=None, **kwargs):
        return function if callable(function) else leave

    compile_ = torch.compile
    torch.compile = leave  # type: ignore[assignment]
    importlib.import_module("megatron.core")  # binds it
    torch.compile = compile_


def have_te() -> None:
    """Several modules claim HAVE_TE without Transformer Engine, then test `isinstance(x, None)`.

    Upstream: `extensions/transformer_engine.py` imports without TE and defines its classes as None.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "HAVE_TE", False):
            module.HAVE_TE = False  # type: ignore[attr-defined]


def te_gemm() -> None:
    """Without TE, moe_utils.py uses the name `te_general_gemm` that it never defined (FP32 router)."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def split_sizes() -> None:
    """`maybe_move_tensor_to_cpu` turns split sizes into numpy only if they were on a GPU; all-to-all needs them so."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def move(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = move


def recompute_flag() -> None:
    """`CheckpointWithoutOutput()` stores `fp8=False` as `fp8 is not None`, True, and asks for TE's FP8 state."""
    from megatron.core.tensor_parallel import random

    plain = random.CheckpointWithoutOutput.__init__
    random.CheckpointWithoutOutput.__init__ = lambda self, fp8=None: plain(self, fp8 or None)


def device_random_state() -> None:
    """The private setter of the random state tracker writes to a CUDA generator object."""
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # It then warns at every fork that the CPU's generator moved: here they are one.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def share_storage() -> None:
    """Recomputed outputs get their storage back through C++ that is compiled at the first use, on a GPU or not."""
    from megatron.core.tensor_parallel import random

    def copy(output: torch.Tensor, recomputed: torch.Tensor) -> None:
        output.untyped_storage().resize_(recomputed.untyped_storage().nbytes())
        output.untyped_storage().copy_(recomputed.untyped_storage())

    random._get_share_storage = lambda: copy


BEFORE_IMPORT = (
    current_device,
    device_argument,
    to_cuda,
    streams,
    synchronize,
    ranges,
    record_stream,
    random_state,
    tensor_type,
    keep_sent_tensor,
    no_te,
    no_compile,
)
AFTER_IMPORT = (have_te, te_gemm, split_sizes, recompute_flag, device_random_state, share_storage)

_installed = False


def install(without: Collection[str] = ()) -> None:
    """Apply every patch but those named in `without` (for the tests that show what each is for).

    Raises:
        UserError: this machine has a GPU.
    """
    if not _installed:
        import_megatron(without)
        patch_megatron(without)


def import_megatron(without: Collection[str] = ()) -> None:
    """The first half of `install`."""
    global _installed
    if torch.cuda.is_available():
        raise UserError(
            "runtime.device: cpu is for machines without a GPU; to hide it, start with CUDA_VISIBLE_DEVICES="
        )
    _installed = True
    _apply(BEFORE_IMPORT, without)
    for name in (
        "models.gpt.gpt_model",
        "models.gpt.gpt_layer_specs",
        "optimizer",
        "pipeline_parallel.schedules",
        "transformer.multi_latent_attention",
        "transformer.multi_token_prediction",
        "transformer.moe.token_dispatcher",
        "dist_checkpointing",
    ):
        importlib.import_module(f"megatron.core.{name}")


def patch_megatron(without: Collection[str] = ()) -> None:
    """The second half."""
    _apply(AFTER_IMPORT, without)


def _apply(patches: tuple[Callable, ...], without: Collection[str]) -> None:
    left_out = {*without, *megatron_versions.superfluous_patches()}
    for patch in patches:
        if patch.__name__ not in left_out:
            patch()


def use_adam(adam: type) -> None:
    """Give Megatron's optimizers `adam`, of TE's FusedAdam's interface, where they look for TE's.

    With torch's AdamW instead, ZeRO-1 saves checkpoints that it cannot load (distrib_optimizer.py:642), and
    there are no BF16 moments.
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import distrib_optimizer
    from packaging.version import Version

    optimizer.Adam = distrib_optimizer.Adam = adam  # type: ignore[misc]
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    # OptimizerConfig imports TE's FusedAdam by name to look at its arguments, and compares TE's version.
    # The stand-in package comes after Megatron's import, so that nothing else takes TE for installed.
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["transformer_engine.pytorch.optimizers"].FusedAdam = adam  # type: ignore[attr-defined]
    utils.get_te_version = lambda: Version("0.0")


def use_linear(linear: type) -> None:
    """Let MLA take `linear` for its down-projections: it knows the classes it accepts by identity."""
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.Linear = linear


@contextlib.contextmanager
def on_meta():
    """Build models without memory: Megatron's allocations go to the meta device."""
    before = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = before  # type: ignore[assignment]
