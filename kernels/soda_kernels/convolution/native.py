"""What the native library calls for the convolutions that it has no kernels for."""

from soda_kernels._native import Fallback
from soda_kernels.convolution import ops  # noqa: F401  registers the reference

FALLBACKS = (Fallback("conv3x3"), Fallback("conv3x3_backward"))
