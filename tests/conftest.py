"""What holds for every test: no network, no display, no cache outside a temporary folder, the same seeds each time."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator

import pytest

# One thread, for subprocesses too: the tests' tensors are tiny, and two threads wait for each other whenever another
# program holds a core. Read by OpenMP when PyTorch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Read by the libraries when they are first imported, so set before any test module is.
_cache = tempfile.TemporaryDirectory(prefix="soda-tests-")
os.environ.update(HF_HOME=_cache.name, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", MPLBACKEND="Agg")

# With no GPU, kernels run in Triton's interpreter; Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A GPU machine may run the kernel tests with PyTorch and pytest alone.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
    settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Start each test from the same global random state, so that its order among others changes nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked exhaustive unless asked for; skip what is marked gpu where there is no CUDA device."""
    if "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
