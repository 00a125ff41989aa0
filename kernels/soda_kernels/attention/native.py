"""What the native library calls for the attention that it has no kernels for: PyTorch's own, for CPUs."""

from soda_kernels._library import without_autocast
from soda_kernels._native import Fallback
from soda_kernels.attention import ops

FALLBACKS = tuple(Fallback(name, without_autocast(function)) for name, function in ops.CPU_FUNCTIONS.items())
