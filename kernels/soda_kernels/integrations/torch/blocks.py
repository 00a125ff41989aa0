"""Residual blocks that are known by their attributes: of guided-diffusion (ADM), EDM and DiffAE."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soda_kernels.attention.api import attention
from soda_kernels.integrations import norms
from soda_kernels.integrations.replacement import Fused
from soda_kernels.integrations.torch.behaviour import example

_SIDE = 4


class Block(Fused):
    """A kind of residual block: how it is known, what to try it on, and what it computes."""

    norms: tuple[str, ...]
    """Names of the group norms whose modulation or SiLU the block applies."""

    @staticmethod
    def recognizes(module: nn.Module) -> bool:
        """Tell by its attributes whether a module looks like one."""
        raise NotImplementedError

    @staticmethod
    def calls(module: Any) -> list[tuple[Any, ...]]:
        """Return arguments to try a module with."""
        raise NotImplementedError


def _condition(layers: Any, hidden: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    """Project a condition to (scale, shift), [N, C] each; where there is a scale alone, the shift is zero."""
    projected = layers(condition).to(hidden.dtype)
    if projected.shape[1] == hidden.shape[1]:
        return projected, projected.new_zeros(projected.shape)
    scale, shift = projected.chunk(2, dim=1)
    return scale, shift


def _normed(layers: Any, hidden: Tensor, modulations: norms.Modulations) -> Tensor:
    """Run [norm, SiLU, dropout, convolution] with modulations after the norm."""
    norm, _, dropout, *rest = layers
    dropout_p = norms.drop_probability(dropout)
    hidden = norm(hidden, modulations, activation="silu", dropout_p=dropout_p or 0.0)
    hidden = dropout(hidden) if dropout_p is None else hidden
    for layer in rest:
        hidden = layer(hidden)
    return hidden


def _first_half(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the block's input and its first convolution's output, both at the new size."""
    if not getattr(block, "updown", False):
        return x, block.in_layers(x)
    hidden = block.in_layers[:-1](x)
    hidden, x = block.h_upd(hidden), block.x_upd(x)
    return x, block.in_layers[-1](hidden)


def _is_adm_shaped(module: Any) -> bool:
    sequences = [getattr(module, name, None) for name in ("in_layers", "emb_layers", "out_layers")]
    if not all(isinstance(sequence, nn.Sequential) for sequence in sequences) or len(module.out_layers) < 4:
        return False
    _, silu, dropout, *_ = module.out_layers
    return norms.is_silu(silu) and isinstance(dropout, nn.Dropout) and hasattr(module, "skip_connection")


def _channels(sequence: Any) -> int:
    """Return the channels of a sequence's first group norm."""
    return len(sequence[0].weight)


def _width(sequence: Any) -> int:
    """Return how long the embedding is that a sequence projects."""
    return next(int(layer.in_features) for layer in sequence if isinstance(layer, nn.Linear))


class AdmBlock(Block):
    """The `ResBlock` of guided-diffusion with `use_scale_shift_norm`."""

    label = "residual block of the guided-diffusion kind"
    norms = ("in_layers.0", "out_layers.0")

    @staticmethod
    def recognizes(module: nn.Module) -> bool:
        return _is_adm_shaped(module) and bool(getattr(module, "use_scale_shift_norm", False))

    @staticmethod
    def calls(module: Any) -> list[tuple[Any, ...]]:
        image = example(2, _channels(module.in_layers), _SIDE, _SIDE)
        return [(image, example(2, _width(module.emb_layers)))]

    def fused_forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        x, hidden = _first_half(self, x)
        hidden = _normed(self.out_layers, hidden, [_condition(self.emb_layers, hidden, emb)])
        return self.skip_connection(x) + hidden


class DiffaeBlock(Block):
    """The `ResBlock` of DiffAE: modulated by the time embedding, then by the latent."""

    label = "residual block of the DiffAE kind"
    norms = ("in_layers.0", "out_layers.0")

    @staticmethod
    def recognizes(module: nn.Module) -> bool:
        return _is_adm_shaped(module) and isinstance(getattr(module, "cond_emb_layers", None), nn.Sequential)

    @staticmethod
    def calls(module: Any) -> list[tuple[Any, ...]]:
        channels = _channels(module.in_layers)
        emb, cond = (example(2, _width(layers)) for layers in (module.emb_layers, module.cond_emb_layers))
        if not DiffaeBlock.has_lateral(module):
            image = example(2, channels, _SIDE, _SIDE)
            return [(image, emb, cond), (image, emb)]
        image, lateral = example(2, channels, _SIDE, _SIDE).tensor_split([channels // 2], dim=1)
        return [(image, emb, cond, lateral), (image, emb, None, lateral)]

    @staticmethod
    def has_lateral(module: Any) -> bool:
        """Tell whether a block concatenates the skip connection itself."""
        return bool(getattr(getattr(module, "conf", module), "has_lateral", False))

    def fused_forward(
        self: Any, x: Tensor, emb: Tensor | None = None, cond: Tensor | None = None, lateral: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        if DiffaeBlock.has_lateral(self):
            if lateral is None:
                raise ValueError("lateral is None; this block concatenates it to its input")
            x = torch.cat([x, lateral], dim=1)
        x, hidden = _first_half(self, x)
        given = ((self.emb_layers, emb), (self.cond_emb_layers, cond))
        modulations = [_condition(layers, hidden, each) for layers, each in given if each is not None]
        return self.skip_connection(x) + _normed(self.out_layers, hidden, modulations)


class EdmBlock(Block):
    """The `UNetBlock` of EDM's `DhariwalUNet` and `SongUNet`."""

    label = "residual block of the EDM kind"
    norms = ("norm0", "norm1")

    @staticmethod
    def recognizes(module: nn.Module) -> bool:
        names = ("norm0", "conv0", "affine", "norm1", "conv1", "skip", "skip_scale", "adaptive_scale", "num_heads")
        return all(hasattr(module, name) for name in names)

    @staticmethod
    def calls(module: Any) -> list[tuple[Any, ...]]:
        image = example(2, len(module.norm0.weight), _SIDE, _SIDE)
        return [(image, example(2, module.affine.weight.shape[1]))]

    def fused_forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.conv0(self.norm0(x, activation="silu"))
        params = self.affine(emb).to(hidden.dtype)
        modulations = []
        if self.adaptive_scale:
            modulations.append(tuple(params.chunk(2, dim=1)))
        else:
            hidden = hidden + params[:, :, None, None]
        dropout_p = float(self.dropout) if self.training else 0.0
        fused_p = dropout_p if dropout_p < 1.0 else 0.0
        hidden = self.norm1(hidden, modulations, activation="silu", dropout_p=fused_p)
        hidden = self.conv1(hidden if fused_p == dropout_p else F.dropout(hidden, dropout_p))
        hidden = (hidden + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if not self.num_heads:
            return hidden
        count, channels, *size = hidden.shape
        qkv = self.qkv(self.norm2(hidden)).reshape(count, self.num_heads, channels // self.num_heads, 3, -1)
        q, k, v = qkv.permute(3, 0, 4, 1, 2)  # [N, positions, heads, head_dim] each
        mixed = attention(q, k, v).flatten(2).transpose(1, 2).reshape(count, channels, *size)
        return (hidden + self.proj(mixed)) * self.skip_scale


KINDS: tuple[type[Block], ...] = (DiffaeBlock, AdmBlock, EdmBlock)
"""In the order in which they are tried."""
