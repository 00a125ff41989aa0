"""Noise schedules as tables of alpha_bar and what follows from it.

A schedule is variance-preserving: x_t = alpha * x0 + sigma * noise with alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soda_kernels._checks import check_choice, check_float_tensor

_CLAMP = 1e-5


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Tables over the step index, 0 the cleanest, each of shape [num_steps].

    They are columns of one tensor, so that what a step needs of several of them comes with one sector of memory.

    Attributes:
        alpha_bar: the share of the signal's variance. alpha: its root. sigma: the root of 1 - alpha_bar.
        logsnr: ln(alpha_bar / (1 - alpha_bar)).
        name: how the schedule was made.
    """

    alpha_bar: Tensor
    alpha: Tensor
    sigma: Tensor
    logsnr: Tensor
    name: str = field(default="custom", kw_only=True)

    @classmethod
    def from_alpha_bar(
        cls, alpha_bar: Tensor, *, name: str = "custom", dtype: torch.dtype = torch.float32
    ) -> NoiseSchedule:
        """Build the tables in fp64 from an alpha_bar table of shape [num_steps], and store them as `dtype`.

        Raises:
            TypeError: alpha_bar is not a float tensor.
            ValueError: it is not one-dimensional, a value is not strictly between 0 and 1, or dtype is neither fp32 nor
                fp64.
        """
        check_float_tensor("alpha_bar", alpha_bar)
        check_choice("dtype", dtype, (torch.float32, torch.float64))
        if alpha_bar.ndim != 1 or not len(alpha_bar):
            raise ValueError(f"alpha_bar has shape {tuple(alpha_bar.shape)}; it must be (num_steps,)")
        exact = alpha_bar.to(torch.float64)
        if not bool(((exact > 0) & (exact < 1)).all()):
            raise ValueError("alpha_bar has values outside (0, 1); clamp them, since logsnr must be finite")
        tables = (exact, exact.sqrt(), (1 - exact).sqrt(), exact.log() - torch.log1p(-exact))
        return cls(*torch.stack(tables, dim=1).to(dtype).unbind(1), name=name)

    @classmethod
    def inverted_cosine(cls, num_steps: int, *, dtype: torch.dtype = torch.float32) -> NoiseSchedule:
        """alpha_bar(t) = (2 / pi) arccos(sqrt(t)): the inverse function of the cosine schedule, richer in medium noise.

        The table is alpha_bar((i + 1) / num_steps), clamped to [1e-5, 1 - 1e-5].

        Reference:
            Hudson et al. 2023 (SODA).
        """
        alpha_bar = torch.acos(_times(num_steps).sqrt()) * (2 / math.pi)
        return cls.from_alpha_bar(alpha_bar.clamp(_CLAMP, 1 - _CLAMP), name="inverted_cosine", dtype=dtype)

    @classmethod
    def cosine(cls, num_steps: int, *, dtype: torch.dtype = torch.float32) -> NoiseSchedule:
        """alpha_bar(t) = cos(pi t / 2)^2, tabulated and clamped as in `inverted_cosine`.

        Reference:
            Nichol and Dhariwal 2021, equation 17, with offset 0.
        """
        alpha_bar = torch.cos(_times(num_steps) * (math.pi / 2)).square()
        return cls.from_alpha_bar(alpha_bar.clamp(_CLAMP, 1 - _CLAMP), name="cosine", dtype=dtype)

    @classmethod
    def linear(
        cls, num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02, *, dtype: torch.dtype = torch.float32
    ) -> NoiseSchedule:
        """alpha_bar[i] = prod_{j <= i} (1 - beta_j), with betas evenly spaced from beta_start to beta_end.

        Reference:
            Ho, Jain and Abbeel 2020, section 4.
        """
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start, beta_end are {beta_start}, {beta_end}; 0 < beta_start <= beta_end < 1 holds")
        _times(num_steps)
        betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64, device="cpu")
        return cls.from_alpha_bar((1 - betas).cumprod(0), name="linear", dtype=dtype)

    @property
    def num_steps(self) -> int:
        return len(self.alpha_bar)

    @property
    def device(self) -> torch.device:
        return self.alpha_bar.device

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Return the schedule with its tables on `device`; itself if they are there."""
        if self.device == torch.device(device):
            return self
        tables = torch.stack((self.alpha_bar, self.alpha, self.sigma, self.logsnr), dim=1)
        return NoiseSchedule(*tables.to(device).unbind(1), name=self.name)


def _times(num_steps: int) -> Tensor:
    """(i + 1) / num_steps in fp64."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps is {num_steps!r}; it must be a positive int")
    return torch.arange(1, num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
