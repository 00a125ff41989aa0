"""Who computes an op: what the providers of every family share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.accuracy import MOST_TIMES_TORCH
from benchmarks.steps import Forward, Problem

OURS = "ours"
BASELINE = "eager"


class Refused(Exception):
    """A provider does not take a case; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One implementation of an op."""

    name: str
    build: Callable[[], Forward]
    """Makes the function that is timed, with the signature of this project's own; called once a case and mode."""
    unavailable: Callable[[Problem], str | None] = lambda _problem: None
    """Says why it cannot run these tensors, if so."""
    compiled: bool = False
    """Whether torch.compile made it: it then recompiles whenever PyTorch's global state changes."""
    most_times_torch: float = MOST_TIMES_TORCH
    """How many times the error of PyTorch's chain its results may have."""
    draws: bool = False
    """Whether the noise that it is timed with is its own, so that it is checked on noise that is handed to it."""
    names_kernel: bool = False
    """Whether it chooses among kernels, so that its rows name the one that ran."""


def compiled(forward: Forward) -> Forward:
    """Return what torch.compile makes of a function."""
    # Else every case of one process would count towards one limit of recompilations, and the last ones run eagerly.
    torch._dynamo.reset()
    return torch.compile(forward, dynamic=False)


def is_installed(module: str) -> bool:
    """Tell whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package on the way to the module
        return False
