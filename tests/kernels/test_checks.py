"""The argument validators themselves, on what they accept and on their bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from soda_kernels import _checks

X = torch.randn(3, 8, 4, 5)
META = torch.device("meta")
CPU = torch.device("cpu")


def test_int64_scalar_wraps_ints_to_64_bits_and_widens_tensors() -> None:
    assert int(_checks.int64_scalar("seed", 2**64 + 5, CPU)) == 5
    assert int(_checks.int64_scalar("seed", 2**63, CPU)) == -(2**63)
    assert int(_checks.int64_scalar("seed", -1, CPU)) == -1
    assert int(_checks.int64_scalar("seed", np.int64(7), CPU)) == 7  # type: ignore[arg-type]
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        widened = _checks.int64_scalar("seed", torch.tensor(7, dtype=dtype), CPU)
        assert (widened.dtype, widened.ndim, int(widened)) == (torch.int64, 0, 7)


def test_int64_vector_takes_tensors_lists_ranges_and_arrays() -> None:
    for value in (torch.arange(3, dtype=torch.int32), [0, 1, 2], range(3), np.arange(3)):
        assert torch.equal(_checks.int64_vector("sample_ids", value, 3, CPU), torch.arange(3))
    assert _checks.int64_vector("sample_ids", [], 0, CPU).shape == (0,)
    assert _checks.int64_vector("sample_ids", [2**63, -1], 2, CPU).tolist() == [-(2**63), -1]
    assert _checks.int64_scalar_or_vector("step", torch.arange(3), 3, CPU).shape == (3,)
    assert _checks.int64_scalar_or_vector("step", torch.tensor(3), 3, CPU).shape == ()


def test_shapes_and_devices() -> None:
    _checks.check_shape("x", X, (3, 8, 4, 5))
    with pytest.raises(ValueError, match=r"x has shape \(3, 8, 4, 5\); it must be \(3, 8\)"):
        _checks.check_shape("x", X, (3, 8))
    _checks.check_device("x", X, "y", X)
    _checks.check_like("x", X, "y", X.clone())
    with pytest.raises(TypeError, match="x is a int; it must be a tensor"):
        _checks.check_like("x", 1, "y", X)


def test_numbers_and_choices() -> None:
    for number in (0, 0.5, np.float64(0.5)):
        _checks.check_number("eps", number)
        _checks.check_probability("dropout_p", number)
    _checks.check_choice("activation", None, ("silu", None))
    with pytest.raises(TypeError, match="eps is a bool; it must be a number"):
        _checks.check_number("eps", False)


def test_image_memory_format() -> None:
    last, last_3d, plain = torch.channels_last, torch.channels_last_3d, torch.contiguous_format
    assert _checks.image_memory_format(X) == plain
    assert _checks.image_memory_format(X.contiguous(memory_format=last)) == last
    assert _checks.image_memory_format(X.contiguous(memory_format=last)[..., 1:]) == plain  # dense in neither
    assert _checks.image_memory_format(X[:, :, :1, :1].contiguous(memory_format=last)) == plain  # dense in both
    assert _checks.image_memory_format(torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=last_3d)) == last_3d
    assert _checks.image_memory_format(torch.randn(2, 3, 4)) == plain
    assert _checks.image_memory_format(torch.randn(2, 3)) == plain
