"""Ahead-of-time compiles report what the machine code holds, and the gate stops each planted defect."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from soda_kernels._launch import Launch
from soda_kernels.aot import specify
from tests.harness import compilation
from tests.harness import planted_triton as planted
from tests.harness.compilation import Access, CompileError, KernelReport, compile_specs, gate

ARCHS = list(compilation.MAX_SHARED_BYTES)
NVIDIA = [arch for arch in ARCHS if arch.startswith("sm_")]
NUMEL = 1 << 20


def spec(kernel: Any, *arguments: Any, num_warps: int = 4, **constants: int) -> dict[str, Any]:
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    return specify(Launch(kernel=kernel, grid=(1,), arguments=named, constants=constants, num_warps=num_warps))


def big(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(NUMEL, dtype=dtype, device="meta")


def elementwise(kernel: Any, arch: str, numel: int = NUMEL, block: int = 4096, num_warps: int = 4) -> KernelReport:
    (report,) = compile_specs([spec(kernel, big(), big(), numel, BLOCK=block, num_warps=num_warps)], arch)
    return report


def product(dtype: torch.dtype, arch: str, side: int = 128, depth: int = 64) -> KernelReport:
    arguments = (big(dtype), big(dtype), big(torch.float32))
    (report,) = compile_specs([spec(planted.multiply, *arguments, M=side, N=side, K=depth, num_warps=8)], arch)
    return report


@pytest.mark.parametrize("arch", ARCHS)
def test_a_copy_passes(arch: str) -> None:
    report = elementwise(planted.copy, arch)
    # 4096 bf16 elements over 4 warps of 32 threads (64 on AMD), 8 elements an instruction.
    instructions = 4096 // (4 * (32 if arch in NVIDIA else 64)) // 8
    assert report.vector_bytes("load") == report.vector_bytes("store") == {16: instructions}
    assert report.max_vector_bytes == 16
    assert {access.line.partition(":")[0] for access in report.accesses} == {"planted_triton.py"}
    assert 0 < report.registers <= 64 and report.spills == report.local_bytes == report.shared_bytes == 0
    assert not gate(report, max_registers=64, max_shared_bytes=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_loads_with_a_stride_are_narrow(arch: str) -> None:
    (complaint,) = gate(elementwise(planted.gather_even, arch))
    assert "narrow loads of x_ptr" in complaint and "2 bytes" in complaint and "planted_triton.py" in complaint
    assert not gate(elementwise(planted.gather_even, arch), tensors=["y_ptr"])
    assert not gate(elementwise(planted.gather_even, arch), min_vector_bytes=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_mask_of_odd_length_makes_both_narrow(arch: str) -> None:
    widest, loads, stores = gate(elementwise(planted.copy, arch, numel=NUMEL - 1, block=2048))
    assert "no access wider than 2 bytes" in widest and "narrow loads" in loads and "narrow stores" in stores


@pytest.mark.parametrize("arch", ARCHS)
def test_a_tile_too_small_for_its_threads_is_narrow(arch: str) -> None:
    (complaint,) = gate(elementwise(planted.copy, arch, block=512 if arch in NVIDIA else 1024))
    assert "no access wider than 8 bytes" in complaint


@pytest.mark.parametrize("arch", NVIDIA)
def test_a_tile_too_large_spills(arch: str) -> None:
    fitting = elementwise(planted.normalize, arch, block=32768, num_warps=16)
    assert not gate(fitting, max_registers=128)
    assert [(access.kind, access.tensors) for access in fitting.accesses] == [
        ("load", ("x_ptr",)),
        ("store", ("y_ptr",)),
    ]
    report = elementwise(planted.normalize, arch, block=65536, num_warps=16)
    assert report.spills > 0 and report.local_bytes > 0
    spills, local = gate(report)
    assert "spills" in spills and "local memory" in local


def test_a_tile_too_large_spills_on_amd() -> None:
    report = product(torch.float16, "gfx942", depth=512)
    assert report.spills > 0 and report.local_bytes > 0
    assert any("spills" in complaint for complaint in gate(report))
    assert not gate(product(torch.float16, "gfx942"))


@pytest.mark.parametrize("arch", ARCHS)
def test_more_shared_memory_than_there_is(arch: str) -> None:
    assert not gate(product(torch.float16, arch))
    report = product(torch.float16, arch, depth=512)
    assert report.shared_bytes > compilation.MAX_SHARED_BYTES[arch]
    assert [complaint for complaint in gate(report) if "shared memory" in complaint]


def test_less_than_the_plan_allows() -> None:
    report = product(torch.float16, "sm_90")
    registers, shared = gate(report, max_registers=report.registers - 1, max_shared_bytes=report.shared_bytes - 1)
    assert "registers" in registers and "shared memory" in shared
    assert not gate(report, max_registers=report.registers, max_shared_bytes=report.shared_bytes)


def test_matrix_instructions() -> None:
    assert not gate(product(torch.float16, "sm_90"), hgmma=True)
    (complaint,) = gate(product(torch.float32, "sm_90", side=64, depth=32), hgmma=True)
    assert "no warp-group matrix instructions" in complaint
    assert not product(torch.float16, "sm_80").has_hgmma


def test_one_wide_tensor_does_not_hide_a_narrow_one() -> None:
    wide = Access(kind="load", bytes=16, line="a.py:1", tensors=("x_ptr",), count=8)
    narrow = Access(kind="load", bytes=4, line="a.py:2", tensors=("scale_ptr",), count=4)
    scalar = Access(kind="load", bytes=4, line="a.py:3", tensors=("mean_ptr",), count=1)
    tail = Access(kind="load", bytes=2, line="a.py:1", tensors=("x_ptr",), count=8)
    report = dataclasses.replace(elementwise(planted.copy, "sm_90"), accesses=(wide, narrow, scalar, tail))
    (complaint,) = gate(report)
    assert "a.py:2: narrow loads of scale_ptr (4 of 4 bytes)" in complaint
    assert gate(report, tensors=["x_ptr", "scale_ptr"]) == [complaint]
    assert not gate(report, tensors=["x_ptr"])
    unknown = dataclasses.replace(report, accesses=(wide, dataclasses.replace(narrow, tensors=())))
    assert len(gate(unknown, tensors=["x_ptr"])) == 1


@pytest.mark.parametrize("arch", ARCHS)
def test_accesses_are_traced_to_their_tensors(arch: str) -> None:
    arguments = (big(), big(torch.float32), big(), NUMEL // 2, 4)
    (report,) = compile_specs([spec(planted.scale_selected, *arguments, BLOCK=4096)], arch)
    reached: dict[tuple[str, ...], set[int]] = {}
    for access in report.accesses:
        reached.setdefault(access.tensors, set()).add(access.bytes)
    # A choice between two pointers, a helper function, and a pointer that a loop moves on.
    # AMD loads the scalar, which all lanes share, by its scalar unit, and that is not among the accesses.
    assert set(reached) == {("x_ptr", "y_ptr"), ("y_ptr",), *([("scale_ptr",)] if arch in NVIDIA else [])}
    assert reached["y_ptr",] == {16}


def test_the_listing_is_kept() -> None:
    assert "LDG.E.128" in elementwise(planted.copy, "sm_90").listing.read_text()
    assert "global_load_dwordx4" in elementwise(planted.copy, "gfx942").listing.read_text()


def test_an_absent_tensor_is_compiled_away() -> None:
    arguments = (None, big(), NUMEL)
    described = spec(planted.copy_or_clear, *arguments, BLOCK=4096)
    assert described["constants"]["x_ptr"] is None
    (report,) = compile_specs([described], "sm_90")
    assert report.vector_bytes("load") == {} and report.vector_bytes("store") == {16: 4}


def test_equal_launches_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    described = spec(planted.copy, big(), big(), NUMEL, BLOCK=2048)
    (before,) = compile_specs([described], "sm_90")
    compilation._compile.cache_clear()  # what is left is on disk

    def refuse(triton_path: str | None) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compilation, "_worker", refuse)
    assert compile_specs([described, dict(reversed(described.items()))], "sm_90") == [before, before]
    with pytest.raises(AssertionError, match="compiled again"):
        compile_specs([{**described, "num_stages": 7}], "sm_90")


def test_a_kernel_that_does_not_compile() -> None:
    with pytest.raises(CompileError, match=r"(?s)planted_triton:copy on sm_90 \(Triton .*power of 2"):
        elementwise(planted.copy, "sm_90", block=1000)


def test_a_compiler_that_dies_is_said_and_replaced() -> None:
    worker = compilation._worker(None)
    worker.process.kill()
    described = spec(planted.copy, big(), big(), NUMEL, BLOCK=1000)
    with pytest.raises(CompileError, match="ended its process"):
        compile_specs([described], "sm_90")
    with pytest.raises(CompileError, match="power of 2"):
        compile_specs([described], "sm_90")


def test_another_triton(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text('__version__ = "0.0.1"\nraise ImportError("the other Triton")\n')
    described = spec(planted.copy, big(), big(), NUMEL, BLOCK=4096)
    with pytest.raises(CompileError, match=r"Triton 0\.0\.1\): ImportError: the other Triton"):
        compile_specs([described], "sm_90", triton_path=tmp_path)
    with pytest.raises(ValueError, match="arch is 'sm_12'"):
        compile_specs([described], "sm_12")
