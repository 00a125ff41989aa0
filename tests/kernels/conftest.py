"""What the tests of native CPU kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from soda_kernels import _native


@pytest.fixture(params=_native.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run with one instruction set, and with the best again afterwards."""
    best = _native.native_status().isa
    try:
        _native.use_isa(request.param)
    except ValueError as missing:
        pytest.skip(str(missing))
    yield request.param
    assert best is not None
    _native.use_isa(best)
