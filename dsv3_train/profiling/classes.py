"""What a kernel is, by its name: one table, first match wins. `--classes FILE.yaml` puts rules of one's own before it.

- {class: my GEMM, kind: compute, match: "my_gemm_.*"}      # kind: compute or communication; match: a regex
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_train.errors import UserError, on_one_line
from dsv3_train.regular import text

COMPUTE, COMMUNICATION = "compute", "communication"
UNCLASSIFIED = "unclassified"
"""Counts as compute, so that the parts of a step sum to its span; always listed by name."""


_MOST_BYTES = 1 << 20
"""Of a file of rules."""
_LOOKED_AT = 1000
"""Characters of a name: templates run to many thousands, and what a kernel is stands at the front."""


_MOST_NAMES = 10_000
"""Names that are looked at so closely; a trace has a few thousand at most, but for hostile ones."""


class Rule(NamedTuple):
    name: str
    kind: str
    match: str
    """Regular expression, searched in the kernel's name in small letters (of a rule of one's own: in either case)."""


def _comm(name: str, match: str) -> Rule:
    return Rule(name, COMMUNICATION, match)


def _compute(name: str, match: str) -> Rule:
    return Rule(name, COMPUTE, match)


# Copies: between host and device or between devices they are communication; within one device (DtoD) they move data
# in its own memory, as an elementwise kernel does, and are compute. So are memsets. Which way is in the name: `Memcpy
# DtoD (Device -> Device)` of CUPTI, `MemcpyD2D` of XLA, `CopyDeviceToDevice` and `MEMORY_COPY_DEVICE_TO_DEVICE` of
# AMD's roctracer and rocprofiler, which call a copy between two devices so too. One that does not say is unclassified.
def _way(source: str, target: str) -> str:
    return rf"{source}[ _]*(to|2)[ _]*{target}"


_HOST, _ON_DEVICE, _ARRAY = "h(ost)?", "d(evice)?", "a(rray)?"
COPIES = (
    _comm("copy PtoP", r"ptop|p2p|peer"),
    _compute("copy DtoD", rf"{_way(_ON_DEVICE, '[da]')}|{_way(_ARRAY, '[da]')}|{_way(_HOST, 'h')}"),
    _comm("copy HtoD", _way(_HOST, "[da]")),
    _comm("copy DtoH", rf"{_way(_ON_DEVICE, 'h')}|{_way(_ARRAY, 'h')}"),
    _compute("copy DtoD", r"\(device -> device\)"),
)
_IS_COPY = re.compile(r"(hip|cuda|cu)?_?(memcpy|memory_?copy|copy)", re.IGNORECASE)
_IS_MEMSET = re.compile(r"(hip|cuda|cu)?_?(memset|fill_?buffer)", re.IGNORECASE)
MEMSETS = (_compute("memset", r""),)

_GEMM = (
    r"(?<!fb)gemm|gemv|nvjet|cublas|xmma|cijk_|matmul|wgmma|_h?mma_|s\d+(gmma|16816|1688|884)|split_?k_?reduce"
    r"|cutlass::device_kernel|cutlass::kernel|triton_(tem|mm)|_bmm_|\bmm_kernel|_mm_kernel|dot_kernel"
)


def _gemm(dtype: str, match: str) -> Rule:
    return _compute(f"GEMM {dtype}", rf"^(?=.*?(?:{_GEMM})).*?(?:{match})")


def _after(words: str, what: str) -> str:
    """`what` behind the first of `words`. `words.*what` would look to the end from each: seconds for hostile names."""
    return rf"^(?:(?!{words}).)*(?:{words}){what}"


_NCCL = "nccl|rccl"
_EP = r"intranode|internode|deep_?ep|hybrid_ep|\bep::"
_COLLECTIVE = r"all[-_]?reduce|all[-_]?gather|reduce[-_]?scatter|all[-_]?to[-_]?all"

KERNELS = (
    _comm(
        "XLA collective",
        rf"^%?({_COLLECTIVE}|ragged-all-to-all|collective-(permute|broadcast)|send|recv)(-start|-done)?\.?$",
    ),
    _comm("NCCL all-to-all", _after(_NCCL, ".*all_?to_?all")),
    _comm("NCCL all-reduce", _after(_NCCL, ".*all_?reduce")),
    _comm("NCCL all-gather", _after(_NCCL, ".*all_?gather")),
    _comm("NCCL reduce-scatter", _after(_NCCL, ".*reduce_?scatter")),
    _comm("NCCL broadcast", _after(_NCCL, ".*broadcast")),
    _comm("NCCL reduce", _after(_NCCL, ".*kernel_reduce")),
    _comm("NCCL send/recv", _after(_NCCL, ".*send_?recv") + "|nccl:(send|recv)"),
    _comm("NCCL", r"nccl(dev)?kernel|rccl|^nccl:"),
    _compute("route", r"get_dispatch_layout"),
    _comm("DeepEP dispatch", _after(_EP, "(?!.*notify).*dispatch")),
    _comm("DeepEP combine", _after(_EP, "(?!.*notify).*combine")),
    _comm(
        "DeepEP notify", _after("intranode|internode|deep_?ep|hybrid_ep", ".*(notify|barrier|clean|sync|query|rank)")
    ),
    _comm("NVSHMEM", r"nvshmem|rocshmem"),
    _comm(
        "other collective",
        r"mscclpp?|oneccl|hccl|userbuffers|cross_device_reduce|(one|two)_shot_all|multimem_|symm_?mem|gloo"
        r"|custom_all_?reduce|lamport|all_?reduce_fusion|all_?reduce_?kernel|allgather_kernel|alltoall",
    ),
    # Named after a collective, and known to no rule: neither a reduction nor a gather of its own GPU. (Triton's, as
    # Inductor writes them, are named after what they work on.)
    _compute(UNCLASSIFIED, rf"^(?!triton_).*({_COLLECTIVE})"),
    _compute("rotary", r"rotary|(?<![a-z])rope"),
    _compute(
        "attention backward",
        _after(r"flash|fmha|attn|attention|sdpa|mla_|\bmha", "(?!.*gemm::).*(bwd|bprop|backward|dgrad|_dq|_dk)")
        + r"|cudnn::fusion::(compute_dot_do_o|convert_dq)",
    ),
    _compute("attention", r"flash|fmha|attn|attention|sdpa|\bmha_|_mla_"),
    _compute(
        "quantise",
        r"quant|qparam|fp8rowwise|hfp8|cast_to_fp8|cast_and_transpose|cast_transpose|cast_back|per_(token|channel|block)_cast|_to_fp8|fp8_cast"
        r"|amax|update_scale|scale_inv|mx_?fp8_cast|^_(en|de)code_e[45]m|"
        + "|".join((_after("block_?scal", ".*(cast|transpose)"), _after("nvte|transformer_engine", ".*transpose"))),
    ),
    _gemm("fp8", r"fp8|e4m3|e5m2|nvjet_(sm\d+_)?[qr]{2}|f8f8|float8"),
    _gemm("bf16", r"bf16|bfloat16|nvjet_(sm\d+_)?t[a-z]t"),
    _gemm("fp16", r"fp16|f16|half|hgemm|h884|h1688|h16816|nvjet_(sm\d+_)?h[a-z]h|float16"),
    _gemm("int8", r"int8|i8i8|s8s8|imma"),
    _gemm("tf32", r"tf32|s1688gemm|s16816gemm(?!_)"),
    _gemm("fp32", r"sgemm|fp32|f32f32|float|nvjet_(sm\d+_)?sss|simt"),
    _gemm("fp64", r"dgemm|fp64|double|d884"),
    _compute("GEMM", _GEMM),
    _compute(
        "convolution",
        r"conv(?!ert)|[sh]cudnn|nchwtonhwc|nhwctonchw|cask_cudnn|implicit_|winograd|dgrad|wgrad|fprop",
    ),
    _compute("norm", r"norm(?!al)|ln_(fwd|bwd)|\bbn_|gammabeta|rowwisemoments"),
    # Transformer Engine's cross entropy multiplies by the gradient of the loss last.
    _compute("softmax and loss", r"softmax|cross_entropy|nll_loss|logsumexp|^element_mul_kernel"),
    _compute("optimizer", r"adam|multi_tensor|lamb(?!da)|sgd|l2norm"),
    _compute(
        "permute and sort",
        r"permute|unpermute|sort|scatter|gather|index|topk|scan|radix|moe_align|cumsum|expand_to_fused|reduce_fused"
        r"|fused_mapping|row_id_map|count_expert|topk|nonzero|unique|compact|select|multi_(un)?padding",
    ),
    _compute("route", r"rout(e|er|ing)|histogram|bincount|expert|aux_fi"),
    _compute(
        "embedding", r"embedding|bounds_check_indices|offsets_range|compute_grad_weight|krn_partial|partial_segments"
    ),
    _compute("activation", r"swiglu|silu|gelu|relu|sigmoid|glu_|dropout"),
    _compute("transpose", r"transpose"),
    _compute("reduction", r"reduce|reduction|argmax|\bsum"),
    _compute("triton", r"^triton_"),
    _compute(
        "elementwise",
        r"elementwise|unrolled|vectorized|pointwise|fill|copy|cast|memset|cat(array)?_?batched|catarray|foreach|_kernel_cuda"
        r"|distribution|random|philox|tensor_apply|applyop|pooling|pool|upsample|arange|triu|tril|compare|clamp|add_kernel",
    ),
)

OPERATORS = (
    # Megatron-core's autograd functions: what they compute are operators of their own, and the rest is a wait.
    _comm(
        "collective",
        r"^gloo:|^c10d::|^nccl:|^mpi:|record_param_comms|^ucc:|_c10d_functional|^_(alltoall|allgather|reducescatter"
        r"|allreduce|copyto|reducefrom|gatherfrom|scatterto|vocabparallel)",
    ),
    _compute("attention", r"scaled_dot_product|flash_attention|efficient_attention"),
    _compute(
        "GEMM",
        r"::(mm|addmm|bmm|baddbmm|matmul|linear|_scaled_mm|_grouped_mm|mv|addmv|dot|einsum|mkldnn_linear)$|linear",
    ),
    _compute("convolution", r"conv"),
    _compute("norm", r"norm"),
    _compute("softmax and loss", r"softmax|cross_entropy|nll_loss"),
    _compute("optimizer", r"^optimizer\.|adam|_foreach"),
    _compute("permute and sort", r"sort|topk|index|gather|scatter|cumsum|nonzero|bincount|histc|unique|embedding"),
    _compute("autograd", r"^autograd::|backward\d*$|accumulategrad"),
    _compute("elementwise and copies", r"^aten::"),
)
"""For traces without a GPU: PyTorch's operators."""


class Table:
    """Rules in order."""

    def __init__(self, own: tuple[Rule, ...] = ()) -> None:
        before = [(rule, re.compile(rule.match, re.IGNORECASE | re.DOTALL)) for rule in own]
        self._rules = {
            which: [*before, *((rule, re.compile(rule.match, re.DOTALL)) for rule in rules)]
            for which, rules in (("kernel", KERNELS), ("memcpy", COPIES), ("memset", MEMSETS), ("cpu", OPERATORS))
        }
        self._known: dict[tuple[str, str], tuple[str, str]] = {}

    def classify(self, which: str, name: str, collective: str = "") -> tuple[str, str]:
        """(class, kind) of an event.

        Args:
            which: kernel, memcpy, memset, or cpu for an operator.
            collective: what PyTorch's `Collective name` says of an NCCL kernel, whose own name hides all-to-alls.
        """
        length = _LOOKED_AT if len(self._known) < _MOST_NAMES else _LOOKED_AT // 5
        name = name[:length].lower().rstrip("0123456789")  # generated kernels are numbered
        if collective and "nccl" in name:
            name = f"nccldevkernel_{collective.lower()}"
        if (which, name) not in self._known:
            self._known[which, name] = self._search(which, name)
        return self._known[which, name]

    def _search(self, which: str, name: str) -> tuple[str, str]:
        for rule, pattern in self._rules[which]:
            if pattern.search(name):
                return rule.name, rule.kind
        return UNCLASSIFIED, COMPUTE


def which_by_name(name: str) -> str:
    """memcpy or memset where a name is that of a copy which says its way, or of a memset; else kernel."""
    if _IS_MEMSET.match(name):
        return "memset"
    if _IS_COPY.match(name) and any(re.search(rule.match, name[:_LOOKED_AT].lower()) for rule in COPIES):
        return "memcpy"
    return "kernel"


def table(path: Path | None = None) -> Table:
    """The table, with the rules of a YAML file before it.

    Raises:
        UserError: the file is no such list.
    """
    return Table(_own(path) if path else ())


def _own(path: Path) -> tuple[Rule, ...]:
    import yaml

    told = on_one_line(str(path))
    wanted = 'a list of {class: name, kind: compute, match: "regex"}'
    try:
        entries = yaml.safe_load(text(path, _MOST_BYTES, wanted))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{told}: not YAML ({on_one_line(' '.join(str(error).split()))})") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{told}: {wanted} is wanted")
    return tuple(_rule(told, number, entry) for number, entry in enumerate(entries, 1))


def _rule(path: str, number: int, entry: Any) -> Rule:
    at = f"{path}: rule {number}"
    if not isinstance(entry, dict) or set(entry) != {"class", "kind", "match"}:
        raise UserError(f"{at}: has to have the keys class, kind and match, and no others")
    if entry["kind"] not in (COMPUTE, COMMUNICATION):
        raise UserError(f"{at}: kind is {COMPUTE} or {COMMUNICATION}, not {entry['kind']!r}")
    if not isinstance(entry["match"], str) or not entry["match"]:
        raise UserError(f"{at}: match is a regular expression, not {entry['match']!r}")
    try:
        re.compile(entry["match"])
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{at}: match is no regular expression ({error})") from None
    return Rule(on_one_line(str(entry["class"])[:200]), entry["kind"], entry["match"])
