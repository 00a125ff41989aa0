"""Ceilings of GPUs: how many bytes and operations a second, by the data sheet, by assumption, or as measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from soda_engine.records import read_json_lines


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The most that a device reaches."""

    copy_bytes_per_s: float
    """Read and written together."""
    matmul_flops_per_s: float
    matmul_dtype: str = "bf16"

    def least_us(self, num_bytes: float, flops: float) -> float:
        """Return the time below which the device cannot move the bytes and do the operations."""
        return 1e6 * max(num_bytes / self.copy_bytes_per_s, flops / self.matmul_flops_per_s)

    def bound(self, num_bytes: float, flops: float) -> str:
        """Say which of the two it waits for."""
        by_bytes = num_bytes / self.copy_bytes_per_s >= flops / self.matmul_flops_per_s
        return "memory" if by_bytes else "compute"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a maker says of a GPU: of dense products, not of sparse ones, whose figures are twice as large."""

    name: str
    source: str
    bytes_per_s: float
    bf16_flops_per_s: float
    tf32_flops_per_s: float
    """PyTorch lets convolutions in fp32 take it; plain fp32 is slower."""

    def ceilings(self, dtype: str) -> Ceilings:
        """Return the data sheet's ceilings for "bf16" or "fp32"."""
        flops = self.bf16_flops_per_s if dtype == "bf16" else self.tf32_flops_per_s
        return Ceilings(copy_bytes_per_s=self.bytes_per_s, matmul_flops_per_s=flops, matmul_dtype=dtype)


GPUS = {
    "h200": Gpu(name="H200 SXM", source="NVIDIA H200 Tensor Core GPU datasheet",
                bytes_per_s=4.8e12, bf16_flops_per_s=989e12, tf32_flops_per_s=494e12),
    "h100": Gpu(name="H100 SXM", source="NVIDIA H100 Tensor Core GPU datasheet",
                bytes_per_s=3.35e12, bf16_flops_per_s=989e12, tf32_flops_per_s=494e12),
    "a100": Gpu(name="A100 SXM 80 GB", source="NVIDIA A100 Tensor Core GPU datasheet",
                bytes_per_s=2.039e12, bf16_flops_per_s=312e12, tf32_flops_per_s=156e12),
    "l40s": Gpu(name="L40S", source="NVIDIA L40S datasheet",
                bytes_per_s=0.864e12, bf16_flops_per_s=362e12, tf32_flops_per_s=183e12),
    "mi300x": Gpu(name="MI300X", source="AMD Instinct MI300X data sheet",
                  bytes_per_s=5.3e12, bf16_flops_per_s=1307e12, tf32_flops_per_s=653e12),
}  # fmt: skip

# What the kernels' plans assume an H200 to reach.
H200 = Ceilings(copy_bytes_per_s=4.3e12, matmul_flops_per_s=790e12)

ACHIEVABLE = {("h200", "bf16"): H200}
"""By GPU and dtype: assumptions of what a copy and a product reach, until a results file says more."""


def read_ceilings(path: Path, dtype: str) -> tuple[Ceilings, str]:
    """Return the newest ceilings in a results file, and the device they were measured on.

    Args:
        path: a file of rows that `python -m benchmarks run --json` wrote.
        dtype: "bf16" or "fp32": of the product.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no ceilings of that dtype.
    """
    for row in reversed(read_json_lines(path)):
        found = row.get("ceilings") or {}
        if f"matmul_{dtype}_tflops" in found:
            ceilings = Ceilings(
                copy_bytes_per_s=1e9 * found["copy_gbps"], matmul_flops_per_s=1e12 * found[f"matmul_{dtype}_tflops"],
                matmul_dtype=dtype,
            )  # fmt: skip
            return ceilings, (row.get("env") or {}).get("device", "an unknown device")
    raise ValueError(f"{path} has no row with measured ceilings for {dtype}; give another file or --dtype")
