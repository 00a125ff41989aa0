"""The native CPU library: loading it into PyTorch's dispatcher, and saying whether it is there."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from soda_kernels._library import REFERENCE_NAMESPACE, do_without_native

# Both are left beside this file by the build (setup.py): the library, or one line on why there is none.
LIBRARY = Path(__file__).with_name("libsoda_kernels.so")
BUILD_NOTE = Path(__file__).with_name("native_build.txt")

ISAS = ("generic", "avx2", "avx512")
_LANES = {"avx2": 8, "avx512": 16}  # the first takes any rows that the kernels do
ISA_VARIABLE = "SODA_CPU_ISA"

# The families with native kernels; each lists its ops in its `native.FALLBACKS`.
_FAMILIES = ("attention", "convolution", "group_norm", "diffusion")

_library: ctypes.CDLL | None = None
_reason = "it was not loaded"


@dataclass(frozen=True)
class Fallback:
    """What the library calls for an op's inputs that it has no kernels for.

    Attributes:
        op: the op's name. function: what is called, with the op's arguments; its reference if None.
        results: the type of the results in torch.library's language, the op's own if None.
    """

    op: str
    function: Callable[..., Any] | None = None
    results: str | None = None


@dataclass(frozen=True, kw_only=True)
class NativeStatus:
    """Whether ops on CPU tensors run native code, why or why not, and with which instruction set."""

    available: bool
    reason: str
    isa: str | None

    def __str__(self) -> str:
        return f"native CPU library: {self.isa}" if self.available else f"no native CPU library: {self.reason}"


def load() -> None:
    """Register the library's kernels for CPU tensors, if there is one.

    The best instruction set of this processor is taken, or the one that the environment variable SODA_CPU_ISA names.

    Raises:
        ValueError: SODA_CPU_ISA is no instruction set, or one that this processor or the library does not have.
    """
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted is not None and wanted not in ISAS:
        raise ValueError(f"{ISA_VARIABLE} is {wanted!r}; it must be one of {list(ISAS)}")
    if _library is None:
        _load_library()
    if _library is None:
        do_without_native()
    elif wanted is not None:
        use_isa(wanted)


def _load_library() -> None:
    """Load the library, or say why it cannot be."""
    global _library, _reason
    if not LIBRARY.exists():
        noted = BUILD_NOTE.read_text().strip() if BUILD_NOTE.exists() else ""
        _reason = noted or "it was not built; installing the package from its sources builds it"
        return
    try:
        _define_fallbacks()
        torch.ops.load_library(LIBRARY)
        _library = ctypes.CDLL(str(LIBRARY))  # the same library again, for its C functions
    except (OSError, RuntimeError) as error:
        _reason = f"it does not load: {error}"
        return
    _library.soda_kernels_isa.restype = ctypes.c_char_p
    _reason = "built and loaded"


@functools.cache
def _define_fallbacks() -> torch.library.Library:
    """Let the library call what the families list, for as long as what is returned lives: the cache keeps it."""
    fallbacks = torch.library.Library("soda_kernels_native", "DEF")
    for family in _FAMILIES:
        for fallback in importlib.import_module(f".{family}.native", __package__).FALLBACKS:
            reference = _reference(fallback.op)
            arguments, _, results = str(reference._schema).partition("(")[2].partition(") ->")
            fallbacks.define(f"{fallback.op}({arguments}) -> {fallback.results or results}")
            fallbacks.impl(fallback.op, fallback.function or reference, "CompositeExplicitAutograd")
    return fallbacks


def _reference(op: str) -> Any:
    """Return an op that has its reference alone."""
    return getattr(getattr(torch.ops, REFERENCE_NAMESPACE), op).default


def use_isa(name: str) -> None:
    """Run the kernels with another instruction set from here on, in the whole process; for tests and measurements.

    Raises:
        ValueError: there is no library, or this processor or the library does not have that instruction set.
    """
    if _library is None:
        raise ValueError(f"the native library is missing ({_reason}); no instruction set can be chosen")
    if not _library.soda_kernels_use_isa(name.encode()):
        raise ValueError(f"{ISA_VARIABLE} is {name!r}, which this processor or the native library does not have")


@contextlib.contextmanager
def poisoned_results() -> Iterator[list[int]]:
    """Let the library's results hold NaN until they are written, so that a check sees what is not.

    Yields a list, to which the number of results that did is added at the end.
    """
    counts: list[int] = []
    if _library is None:
        yield counts
        return
    _library.soda_kernels_poison(1)
    try:
        yield counts
    finally:
        counts.append(_library.soda_kernels_poison(0))


def normals_of_words(words: torch.Tensor) -> torch.Tensor:
    """Return the library's normals of random words, fp32 of shape [blocks, 4] as the words (int64 of 32 bits) are.

    For tests, which reach through a key only the words that it has.
    """
    assert _library is not None, "the native library is not loaded"
    words = words.to(torch.int32).contiguous()  # wraps, which keeps the bits
    normals = torch.empty(words.shape, dtype=torch.float32)
    data = (ctypes.c_void_p(words.data_ptr()), ctypes.c_int64(len(words)), ctypes.c_void_p(normals.data_ptr()))
    _library.soda_kernels_normals(*data)
    return normals


def in_words(refusal: RuntimeError, op: str, *arguments: Any) -> Exception:
    """Return what an op's reference says of a call on CPU tensors that failed, or the refusal if it says nothing.

    The library leaves wrong values to the reference, whose error reaches Python through it without type and words.
    """
    if _library is None or not arguments[0].is_cpu:
        return refusal
    try:
        _reference(op)(*arguments)
    except Exception as error:
        return error
    return refusal


def isa_of_widths(*widths: int) -> str | None:
    """Name the instruction set that takes rows of such numbers of floats: whole vectors, or a smaller set runs."""
    isa = native_status().isa
    while isa in _LANES and any(width % _LANES[isa] for width in widths):
        isa = ISAS[ISAS.index(isa) - 1]
    return isa


def native_is_loaded() -> bool:
    """Tell whether ops on CPU tensors run the native library."""
    return _library is not None


def native_status() -> NativeStatus:
    """Tell whether ops on CPU tensors run the native library, with which instruction set, or why not."""
    isa = None if _library is None else _library.soda_kernels_isa().decode()
    return NativeStatus(available=_library is not None, reason=_reason, isa=isa)
