"""Bits of the native CPU kernels of modulated group norm: on what they do not depend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from soda_kernels import _native
from tests.kernels.norm_problems import FORMS, LAYOUTS, Form, Problem, call, problem

_native.load()
# Not in silence where it could be built: tests/packaging/test_native_build.py fails there.
pytestmark = pytest.mark.skipif(not _native.native_status().available, reason=str(_native.native_status()))

NATIVE = torch.ops.soda_kernels


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("form", [FORMS[3], FORMS[6], FORMS[7]], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_bits_depend_on_no_thread_count_no_run_and_no_neighbour(
    isa: str, dtype: torch.dtype, layout: str, form: Form
) -> None:
    case = problem((3, 96, 24, 20), 8, layout, form, dtype)
    seed = torch.tensor([4, 1, 9]) if form.dropout_p else None
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 7, 1):
            torch.set_num_threads(threads)
            runs.append(call(case, NATIVE, seed))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    alone = replace(case, leaves={name: leaf if leaf.ndim == 1 else leaf[1:2] for name, leaf in case.leaves.items()})
    outputs = call(alone, NATIVE, seed[1:2] if seed is not None else None)
    assert torch.equal(outputs[0], runs[0][0][1:2])
    assert torch.equal(outputs[2], runs[0][2][1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
@pytest.mark.parametrize(
    ("batch", "channels", "groups", "sides"), [(1, (128, 128), 8, (16, 16)), (2, (29, 171), 25, (9, 15))]
)
def test_a_pairs_bits_depend_on_no_cut(
    isa: str, dtype: torch.dtype, batch: int, channels: tuple[int, int], groups: int, sides: tuple[int, int]
) -> None:
    """Slabs across both images, of which threads get another cut; and a slab that ends where vectors do not."""
    torch.manual_seed(0)
    images = [
        torch.randn(batch, count, *sides).to(dtype).contiguous(memory_format=torch.channels_last) for count in channels
    ]
    weight, bias = torch.randn(2, sum(channels)).unbind()
    dy = torch.randn(batch, sum(channels), *sides).to(dtype).contiguous(memory_format=torch.channels_last)

    def run(part: slice) -> list[Tensor]:
        x, skip = (image[part] for image in images)
        y, _, mean, rstd = NATIVE.modulated_group_norm(
            x, skip, None, weight, bias, [], groups, 1.0, 1e-5, False, 0.0, None
        )
        gradients = NATIVE.modulated_group_norm_backward(
            dy[part], None, x, skip, weight, bias, [], mean, rstd, 1.0, False, 0.0, None
        )
        return [y, mean, rstd, *gradients[:4]]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, last = run(slice(None)), run(slice(batch - 1, None))
        torch.set_num_threads(2)
        two = run(slice(None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a[-1:], b) for a, b in zip(one[:5], last[:5], strict=True))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_a_large_batch_has_the_bits_of_its_small_parts(isa: str, dtype: torch.dtype, layout: str) -> None:
    """From 8 MiB on, gradients are written past the caches; from 32 MiB on, results lie in large pages."""
    leaves = problem((20, 48, 96, 96), 8, layout, Form(pair=True), dtype).leaves
    x, skip, weight, bias = (leaves[name].detach() for name in ("x", "skip", "weight", "bias"))
    dy = torch.cat((skip, x), dim=1)

    def run(part: slice) -> list[Tensor]:
        images = x[part], skip[part]
        y, _, mean, rstd = NATIVE.modulated_group_norm(*images, None, weight, bias, [], 8, 1.0, 1e-5, True, 0.0, None)
        gradients = NATIVE.modulated_group_norm_backward(
            dy[part], None, *images, weight, bias, [], mean, rstd, 1.0, True, 0.0, None
        )
        return [y, *gradients[:2]]

    whole = run(slice(None))
    for first in range(0, 20, 4):
        part = slice(first, first + 4)
        assert all(torch.equal(a, b[part]) for a, b in zip(run(part), whole, strict=True))


def in_other_layouts(case: Problem) -> dict[str, Tensor]:
    """The case's tensors: the second and third image in the other layout, parameters with gaps between numbers."""
    leaves = {}
    for name, leaf in case.leaves.items():
        if leaf.ndim > 2:
            leaves[name] = leaf.detach().contiguous() if name in ("skip", "residual") else leaf.detach()
        else:
            leaves[name] = torch.stack((leaf.detach(), leaf.detach() + 1), dim=-1)[..., 0]
    return leaves


@pytest.mark.parametrize("form", [FORMS[6], FORMS[7]], ids=str)
def test_other_layouts_and_strides_change_no_bit(isa: str, form: Form) -> None:
    case = problem((3, 24, 9, 7), 4, "nhwc", form, torch.float32)
    seed = torch.tensor(3)
    expected = call(case, NATIVE, seed)
    other = call(replace(case, leaves=in_other_layouts(case)), NATIVE, seed)
    pairs = {name: leaf for name, leaf in case.leaves.items() if leaf.ndim == 2}
    rows = {name: torch.cat((leaf, leaf), 1)[:, : leaf.shape[1]] for name, leaf in pairs.items()}
    for found in (other, call(replace(case, leaves=case.leaves | rows), NATIVE, seed)):
        for result, reference in zip(found, expected, strict=True):
            assert torch.equal(result, reference)
            assert result.stride() == reference.stride()


def test_a_gradient_in_the_other_layout_changes_no_bit(isa: str) -> None:
    for layout, other in (("nchw", "nhwc"), ("nhwc", "nchw")):
        x = torch.randn(3, 24, 9, 7).contiguous(memory_format=LAYOUTS[layout])
        statistics = torch.randn(3, 4), torch.rand(3, 4) + 0.5
        dy, dsummed = torch.randn(3, 24, 9, 7), torch.randn(3, 24, 9, 7)
        gradients = [
            NATIVE.modulated_group_norm_backward(
                *(t.contiguous(memory_format=LAYOUTS[name]) for t in (dy, dsummed)), x, None, None, None, [],
                *statistics, 1.0, True, 0.0, None,
            )[0]
            for name in (layout, other)
        ]  # fmt: skip
        assert torch.equal(*gradients)
        assert gradients[1].is_contiguous(memory_format=LAYOUTS[layout])
