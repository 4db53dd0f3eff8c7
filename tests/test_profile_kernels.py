"""Kernels by class, GEMMs by their shapes, and rules of one's own."""

from __future__ import annotations

import pytest

from dsv3_train.errors import UserError
from dsv3_train.profiling.classes import table
from dsv3_train.profiling.gemm import flops
from traces import GEMM, SEND, analyze, event, kernel, launch, write


def test_gemm_tflops_where_shapes_are_known(of):
    m, n, k = 4096, 2048, 7168
    events = [
        event("cpu_op", "aten::linear", 0, 20, 1, 1, **{"External id": 9, "Input Dims": [[m, k], [n, k], []]}),
        event("cpu_op", "aten::mm", 1, 18, 1, 1, **{"External id": 10, "Input Dims": [[m, k], [k, n]]}),
        launch(1, 5),
        launch(2, 7),
        kernel(GEMM, 10, 150, correlation=1),
        kernel("void splitKreduce_kernel<float>()", 160, 50, correlation=2),  # of the same product
        kernel(GEMM, 300, 100),  # of an unknown one
    ]
    gemm = of(events)["gemm"]
    assert gemm["with_shapes_ms"] == pytest.approx(0.2)
    assert gemm["ms"] == pytest.approx(0.3)
    assert gemm["tflops"] == pytest.approx(2 * m * n * k / 200e-6 / 1e12)


@pytest.mark.parametrize(
    ("operator", "dims", "expected"),
    [
        ("aten::mm", [[2, 3], [3, 5]], 60),
        ("aten::addmm", [[5], [2, 3], [3, 5], [], []], 60),
        ("aten::linear", [[7, 2, 3], [5, 3], [5]], 420),
        ("aten::bmm", [[4, 2, 3], [4, 3, 5]], 240),
        ("aten::matmul", [[2, 3], [4, 3, 5]], 240),
        ("aten::_scaled_mm", [[2, 3], [3, 5], [], []], 60),
        ("aten::mm", [[2, 3], [4, 5]], None),
        ("aten::mm", "nonsense", None),
    ],
)
def test_flops_of_shapes(operator, dims, expected):
    assert flops(operator, dims) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ncclKernel_AllReduce_RING_LL_Sum_half(ncclWork*)", "NCCL all-reduce"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevComm*)", "NCCL reduce-scatter"),
        ("ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)", "NCCL"),
        ("void deep_ep::internode::dispatch<false, 8, false>(int4*)", "DeepEP dispatch"),
        ("void deep_ep::internode_ll::combine<true, 3, 7168, 9>(void*)", "DeepEP combine"),
        ("void deep_ep::intranode::cached_notify_combine<8>(void**)", "DeepEP notify"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "GEMM bf16"),
        ("nvjet_qqtst_128x256_128x4_1x2_h_bz_TNT", "GEMM fp8"),
        ("nvjet_sm90_qqtst_128x256_128x4_1x2_h_bz_TNT", "GEMM fp8"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "GEMM bf16"),
        ("_encode_e4m3", "quantise"),
        ("_decode_e5m6", "quantise"),
        ("void transformer_engine::(anonymous namespace)::multi_unpadding_kernel<2, float>(int)", "permute and sort"),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, 7168u>(float*)", "GEMM fp8"),
        ("void cutlass::device_kernel<cutlass::gemm::GemmUniversal<cutlass::float_e4m3_t, bfloat16_t>>", "GEMM fp8"),
        ("ampere_sgemm_128x64_tn", "GEMM fp32"),
        ("void cutlass::Kernel<cutlass_80_tensorop_s1688gemm_64x64_16x6_nn_align4>", "GEMM tf32"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3i_128x64x192_bwd", "attention backward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31_64x64x64", "attention backward"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*, int)", "attention backward"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, int)", "attention backward"),
        ("void transformer_engine::block_scaled_1d_cast_transpose_kernel<true>(float*)", "quantise"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<>", "norm"),
        ("void at::native::elementwise_kernel<128, direct_copy_kernel_cuda(at::Tensor&)::{lambda()#3}>", "elementwise"),
        ("_permute_kernel", "permute and sort"),
        ("_row_id_map_pass_3_kernel", "permute and sort"),
        ("element_mul_kernel", "softmax and loss"),
        (
            "void at::native::(anonymous namespace)::compute_grad_weight<c10::BFloat16, long>(long const*, ...)",
            "embedding",
        ),
        ("void at::native::(anonymous namespace)::krn_partials_per_segment<long>(long*, long const*)", "embedding"),
        ("my_secret_kernel_17", "unclassified"),
    ],
)  # fmt: skip
def test_classes_of_kernels(name, expected):
    assert table().classify("kernel", name)[0] == expected


def test_an_all_to_all_is_named_by_what_torch_says_of_it(of):
    meta = {"Collective name": "all_to_allv", "Process Group Name": "2"}
    assert of([kernel(SEND, 0, 10, 20, **meta)])["classes"][0]["class"] == "NCCL all-to-all"


def test_unknown_kernels_are_listed_and_rules_of_ones_own_come_first(tmp_path):
    path = write(tmp_path / "t.json", [kernel("my_secret_kernel_1", 0, 10), kernel("my_secret_kernel_2", 10, 30)])
    report = analyze(path)
    assert report["unclassified"] == {
        "ms": 0.04,
        "names": [{"name": "my_secret_kernel_2", "ms": 0.03}, {"name": "my_secret_kernel_1", "ms": 0.01}],
    }
    assert report["compute_ms"] == 0.04
    rules = tmp_path / "rules.yaml"
    rules.write_text('- {class: my all-to-all, kind: communication, match: "MY_secret"}\n')
    report = analyze(path, "--classes", rules)
    assert (report["comm_ms"], report["exposed_comm_ms"]) == (0.04, 0.04)
    assert report["classes"][0]["class"] == "my all-to-all"


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ("[", "not YAML"),
        ("{}", "a list of"),
        ("- {class: a, kind: compute}", "rule 1: has to have the keys"),
        ("- {class: a, kind: both, match: x}", "rule 1: kind is compute or communication"),
        ('- {class: a, kind: compute, match: "("}', "rule 1: match is no regular expression"),
    ],
)
def test_bad_rules_are_told(tmp_path, rules, told):
    path = write(tmp_path / "t.json", [kernel(GEMM, 0, 10)])
    (tmp_path / "rules.yaml").write_text(rules)
    with pytest.raises(UserError, match=told):
        analyze(path, "--classes", tmp_path / "rules.yaml")
