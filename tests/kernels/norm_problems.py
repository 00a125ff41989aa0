"""Inputs of modulated group norm that every implementation is tested on, and both sides to call with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from soda_kernels import modulated_group_norm
from tests.kernels import compositions

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last, "ndhwc": torch.channels_last_3d}


@dataclass(frozen=True, kw_only=True)
class Form:
    """Which of the op's parts a case has."""

    affine: bool = True
    modulations: int = 0
    activation: str | None = "silu"
    residual: bool = False
    residual_scale: float = 1.0
    pair: bool = False
    dropout_p: float = 0.0
    scale_offset: float = 1.0

    def __str__(self) -> str:
        return "-".join(
            ["affine" if self.affine else "plain", f"{self.modulations}mod", self.activation or "linear"]
            + ["residual"] * self.residual + ["scaled"] * (self.residual_scale != 1.0) + ["pair"] * self.pair
            + ["dropout"] * (self.dropout_p > 0)
        )  # fmt: skip


FORMS = [
    Form(affine=False, activation=None),
    Form(),
    Form(modulations=1, activation=None, scale_offset=0.0),
    Form(modulations=2),
    Form(modulations=2, affine=False, dropout_p=0.3),
    Form(modulations=1, residual=True),
    Form(modulations=2, residual=True, residual_scale=2**-0.5, dropout_p=0.5),
    Form(modulations=2, pair=True, dropout_p=0.1),
]
SHAPES = [
    ((2, 8), 4),
    ((3, 6), 6),
    ((3, 6, 5), 3),
    ((2, 8, 3, 5), 4),
    ((2, 7, 4, 4), 1),
    ((2, 5, 3, 3), 5),
    ((2, 96, 3, 3), 32),
    ((2, 8, 1, 1), 2),
    ((1, 4, 17, 13), 2),
    ((300, 4, 2, 1), 2),
    ((0, 8, 3, 3), 4),
    ((2, 8, 0), 4),
    ((2, 6, 2, 3, 5), 3),
]


@dataclass
class Problem:
    """The tensors of a case, by name, and how to call both sides with them."""

    leaves: dict[str, Tensor]
    num_groups: int
    form: Form
    factor: Tensor | None
    seed: int = 5

    def arguments(self) -> tuple[Any, dict[str, Any]]:
        leaves, form = self.leaves, self.form
        x = (leaves["x"], leaves["skip"]) if form.pair else leaves["x"]
        modulations = [(leaves[f"scale{i}"], leaves[f"shift{i}"]) for i in range(form.modulations)]
        return x, {
            "weight": leaves.get("weight"), "bias": leaves.get("bias"), "modulations": modulations,
            "scale_offset": form.scale_offset, "activation": form.activation, "residual": leaves.get("residual"),
            "residual_scale": form.residual_scale,
        }  # fmt: skip

    def fused(self) -> tuple[Tensor, ...]:
        x, kwargs = self.arguments()
        out = modulated_group_norm(x, self.num_groups, **kwargs, dropout_p=self.form.dropout_p, seed=self.seed)
        return out if isinstance(out, tuple) else (out,)

    def composed(self) -> tuple[Tensor, ...]:
        x, kwargs = self.arguments()
        factor = None if self.factor is None else self.factor.to(self.leaves["x"].dtype)
        out = compositions.modulated_group_norm(x, self.num_groups, **kwargs, dropout_factor=factor)
        return out if self.form.residual else out[:1]

    def to(self, dtype: torch.dtype) -> Problem:
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves.items()}
        return replace(self, leaves=leaves)

    def gradients(self, outputs: tuple[Tensor, ...], output_gradients: list[Tensor]) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(outputs, list(self.leaves.values()), output_gradients)
        return dict(zip(self.leaves, gradients, strict=True))


def problem(
    shape: tuple[int, ...], num_groups: int, layout: str, form: Form, dtype: torch.dtype = torch.float64,
    parameter_dtype: torch.dtype | None = None, device: str = "cpu",
) -> Problem:  # fmt: skip
    """Random tensors for a case, the same on every device; `num_groups` must divide the channels."""
    batch, channels, *space = shape
    parameter_dtype = parameter_dtype or dtype
    # The boundary of a pair falls inside a group; one channel alone would be dense in both layouts.
    first = min(max(2, channels // 3), channels - 1) if form.pair else channels
    leaves = {"x": torch.randn(batch, first, *space) + 0.5}
    if form.pair:
        leaves["skip"] = torch.randn(batch, channels - first, *space)
    if form.residual:
        leaves["residual"] = torch.randn(shape)
    images = list(leaves)
    if form.affine:
        leaves |= {"weight": torch.randn(channels), "bias": torch.randn(channels)}
    for i in range(form.modulations):
        leaves |= {f"scale{i}": torch.randn(batch, channels) / 2, f"shift{i}": torch.randn(batch, channels)}
    for name, leaf in leaves.items():
        leaf = leaf.to(device, dtype if name in images else parameter_dtype)
        leaves[name] = (leaf.contiguous(memory_format=LAYOUTS[layout]) if name in images else leaf).requires_grad_()
    factor = compositions.dropout_factor(shape, form.dropout_p, 5).to(device) if form.dropout_p else None
    return Problem(leaves, num_groups, form, factor)


def call(case: Problem, op: Any, seed: Tensor | None = None) -> list[Tensor]:
    """Forward and backward through one namespace's ops, all results in a row."""
    leaves, form = {name: leaf.detach() for name, leaf in case.leaves.items()}, case.form
    modulations = [leaves[f"{name}{i}"] for i in range(form.modulations) for name in ("scale", "shift")]
    weight, bias, skip, residual = (leaves.get(name) for name in ("weight", "bias", "skip", "residual"))
    options = form.scale_offset, form.activation == "silu", form.dropout_p, seed
    outputs = op.modulated_group_norm(
        leaves["x"], skip, residual, weight, bias, modulations, case.num_groups, options[0], 1e-5, *options[1:],
        form.residual_scale,
    )  # fmt: skip
    y, summed, mean, rstd = outputs
    torch.manual_seed(3)
    dy, dsummed = torch.randn_like(y), torch.randn_like(summed) if form.residual else None
    gradients = op.modulated_group_norm_backward(
        dy, dsummed, summed if form.residual else leaves["x"], skip, weight, bias, modulations, mean, rstd, *options,
        form.residual_scale,
    )  # fmt: skip
    return tree_leaves((outputs, gradients))
