"""Activations in few bits by Triton's kernels: the bits that the CPU makes, from programs that ptxas cannot misread."""

from __future__ import annotations

import re
import warnings

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from matrices import CASES, matrix  # noqa: E402

from dsv3_train.precision.formats import E4M3, E5M6  # noqa: E402
from dsv3_train.precision.tiles import of_message, to_message, to_tiles  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@pytest.fixture(autouse=True)
def kernels_are_there():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what says that it goes without them
        yield


@DTYPES
@pytest.mark.parametrize("rows", [512, 509, 1])
@pytest.mark.parametrize("fmt", [E4M3, E5M6], ids=["e4m3", "e5m6"])
@pytest.mark.parametrize("name", CASES)
def test_what_waits(name, fmt, rows, dtype):
    x = matrix(name, dtype)[:rows].contiguous()
    got, expected = to_tiles(x, fmt), to_tiles(x.cpu(), fmt)
    assert torch.equal(got.codes.cpu(), expected.codes)
    assert torch.equal(got.exponents.cpu(), expected.exponents)
    assert torch.equal(got.values(dtype).cpu(), expected.values(dtype))


@DTYPES
@pytest.mark.parametrize("width", [7168, 2048, 128])
@pytest.mark.parametrize("rows", [512, 509, 1])
def test_what_travels(rows, width, dtype):
    """Rows whose distance is no multiple of 16 bytes, as of the report's 7168 + 56, have a program of their own."""
    x = torch.cat([matrix("normal", dtype)] * 7, 1)[:rows, :width].contiguous()
    got, expected = to_message(x), to_message(x.cpu())
    assert torch.equal(got.cpu(), expected)
    assert torch.equal(of_message(got, width).values(dtype).cpu(), of_message(expected, width).values(dtype))


@DTYPES
@pytest.mark.parametrize("whole", [True, False], ids=["strides of 16", "any strides"])
@pytest.mark.parametrize("name", ["_encode_e4m3", "_decode_e4m3", "_encode_e5m6", "_decode_e5m6"])
def test_no_register_is_read_that_nothing_writes(name, whole, dtype):
    """With such registers, which are legal where their bits are thrown away, ptxas 12.8.93 read another register."""
    assert unwritten(program(name, whole, dtype)) == set()


def program(name: str, whole: bool, dtype: torch.dtype) -> str:
    """PTX of a kernel."""
    import triton
    from triton.compiler import ASTSource

    from dsv3_train.precision import kernels

    kernel = getattr(kernels, name)
    plain = "*bf16" if dtype is torch.bfloat16 else "*fp32"
    types = {"x_ptr": plain, "out_ptr": plain, "codes_ptr": "*u8", "exponents_ptr": "*u8", "ROWS": "constexpr"}
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    of_16 = {"x_ptr", "out_ptr", "codes_ptr", "exponents_ptr", "width"} | ({"codes_stride"} if whole else set())
    places = {argument: place for place, argument in enumerate(kernel.arg_names)}
    hints = {(places[argument],): [["tt.divisibility", 16]] for argument in of_16 & set(places)}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(places["ROWS"],): 32}, attrs=hints)
    return triton.compile(source, target=triton.runtime.driver.active.get_current_target()).asm["ptx"]


def unwritten(ptx: str) -> set[str]:
    """Registers that are read and that no instruction writes."""
    register, read, written = re.compile(r"%(?:rs|rd|r|p|f|fd|h)\d+\b"), set(), set()
    for line in ptx.splitlines():
        found = re.match(r"(@!?%p\d+)?\s*([a-z][\w.:]*)\s+(\{[^}]*\}|[^,;]+)(.*)", line.split("//")[0].strip())
        if not found:
            continue
        guard, operation, first, others = found.groups(default="")
        of_first = set(register.findall(first))
        read |= {*register.findall(guard), *register.findall(others)}
        if operation.startswith(("st.", "bra", "bar", "red")):
            read |= of_first
        else:
            written |= of_first
    assert len(written) > 50, "no PTX that this can read"
    return read - written
