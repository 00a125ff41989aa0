"""The parts of the denoiser: residual blocks that time and z modulate, self-attention, attention to sections of z.

Residual blocks and attention take an image, or the residual sum that the block before left to them, and leave their
own sum to the next (residual.py). Around attention over a channels_last image all is views: nothing is moved.

Convolutions and linear layers start as PyTorch's do, save those that `zero_init` wraps: the last of every residual
branch, so that an untrained block passes its input on, and every modulation, so that it is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from soda_engine.models.convolution import Conv1x1, Conv3x3, pixels_first, pixels_last
from soda_engine.models.modulation import Modulation
from soda_engine.models.recomputation import (
    Recompute,
    calling,
    doubled,
    halved,
    halved_keeping,
    renormalized,
)
from soda_engine.models.residual import Image, ResidualSum, formed, normalized
from soda_kernels import ModulatedGroupNorm, attention, attention_qkvpacked

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)

# Odd, so that index -> index * constant is one-to-one modulo 2^64: no two blocks of a model share a dropout key.
_DROPOUT_KEY_STRIDE = 0x9E3779B97F4A7C15


def zero_init(layer: Layer) -> Layer:
    """Set a layer's weight and bias to zero and return it."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """ADM's residual block with SODA's modulation at its second norm.

        h   = conv1(resample(silu(GN(x))))
        h   = conv2(dropout(silu(z_scale' * (t_scale' * GN(h) + t_shift) + z_shift)))        scale' = 1 + scale
        out = (h + shortcut(resample(x))) * residual_scale

    The projection of z has no bias, so that a zeroed section modulates nothing.

    Args:
        in_channels, out_channels: of h; the shortcut is the identity where they agree and nothing is skipped in.
        skip_channels: if not 0, forward takes the pair (h, skip), which is never concatenated.
        time_dim: width of the time embedding.
        section_dim: width of the block's section of z.
        num_groups: of both norms.
        dropout: probability of zeroing, in training mode.
        resample: "down" averages and "up" repeats 2x2 pixels.
        residual_scale: factor on the sum.
        index: the block's number in the model; blocks of different numbers drop differently.

    Reference:
        Dhariwal and Nichol 2021 (block); Hudson et al. 2023 (modulation by t, then by z).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_dim: int,
        section_dim: int,
        num_groups: int,
        skip_channels: int = 0,
        dropout: float = 0.0,
        resample: Literal["down", "up"] | None = None,
        residual_scale: float = 1.0,
        index: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels, self.skip_channels, self.out_channels = in_channels, skip_channels, out_channels
        self.resample, self.residual_scale = resample, residual_scale
        total = in_channels + skip_channels
        self.norm1 = ModulatedGroupNorm(num_groups, total)
        self.conv1 = Conv3x3(total, out_channels)
        self.time_proj = zero_init(nn.Linear(time_dim, 2 * out_channels))
        self.z_proj = zero_init(nn.Linear(section_dim, 2 * out_channels, bias=False))
        self.norm2 = ModulatedGroupNorm(num_groups, out_channels, scale_offset=1.0, dropout_p=dropout)
        self.conv2 = zero_init(Conv3x3(out_channels, out_channels))
        self.shortcut = Conv1x1(total, out_channels) if skip_channels or total != out_channels else None
        # As the int64 with the same bits, so that adding it to a key wraps around.
        self.recompute: Recompute = "resampled"
        self.dropout_key = (index * _DROPOUT_KEY_STRIDE + 2**63) % 2**64 - 2**63

    def forward(
        self, x: Image | tuple[Tensor, Tensor], by_time: Modulation, by_section: Modulation, seed: Tensor | None = None
    ) -> ResidualSum:
        """Run the block.

        Args:
            x: [N, in_channels, H, W], or the pair of it and the skip, [N, skip_channels, H, W].
            by_time, by_section: what `time_modulation` and `section_modulation` return.
            seed: [N] int64, one dropout key a sample; needed in training with dropout.

        Returns:
            [N, out_channels, H', W'].
        """
        h = self._conv1(x, normalized(self.norm1, x))
        key = None if seed is None else seed + self.dropout_key
        y = self.norm2(h, by_time, by_section, seed=key)
        if self.recompute == "norms":
            out = calling(self.conv2, y, renormalized(self.norm2, h, by_time, by_section, seed=key))
        else:
            out = self.conv2(y)
        return ResidualSum(out, self._shortcut(x), self.residual_scale)

    def time_modulation(self, time: Tensor) -> Modulation:
        """Project embedded times, [N, time_dim], to scale and shift, [N, out_channels] each."""
        scale, shift = self.time_proj(time).chunk(2, dim=1)
        return scale, shift

    def section_modulation(self, section: Tensor) -> Modulation:
        """Project the block's section of z, [N, section_dim] and zero if masked, to scale and shift likewise."""
        scale, shift = self.z_proj(section).chunk(2, dim=1)
        return scale, shift

    def _conv1(self, x: Image | tuple[Tensor, Tensor], h: Tensor) -> Tensor:
        """Return conv1(resample(h)) of h, the first norm of x."""
        if self.recompute == "nothing":
            return self.conv1(self._resampled(h))
        image = x if isinstance(x, tuple) else formed(x)
        if self.resample == "down" and isinstance(image, Tensor):
            resampled = halved_keeping(image, h)
        else:
            resampled = self._resampled(h)
        if self.recompute == "norms":
            again = renormalized(self.norm1, image)
            return calling(self.conv1, resampled, lambda: self._resampled(again()))
        if self.resample != "up":
            return self.conv1(resampled)
        small = h.detach()
        return calling(self.conv1, resampled, lambda: doubled(small))

    def _shortcut(self, x: Image | tuple[Tensor, Tensor]) -> Tensor:
        if not isinstance(x, tuple):
            x = self._resampled(formed(x))
            return x if self.shortcut is None else self.shortcut(x)
        assert self.shortcut is not None
        return self.shortcut.of_pair(*x)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return halved(x)
        return doubled(x) if self.resample == "up" else x


class ConvResample(nn.Module):
    """Halve the side by a strided 3x3 convolution, or double it by nearest neighbours and a 3x3 convolution."""

    takes_skip = False

    def __init__(self, channels: int, resample: Literal["down", "up"]) -> None:
        super().__init__()
        self.resample = resample
        down = resample == "down"
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if down else Conv3x3(channels, channels)

    def forward(self, x: Image, condition: object = None) -> Tensor:
        """[N, C, H, W] -> [N, C, H', W']; the condition, which other layers take, plays no part."""
        x = formed(x)
        if self.resample == "down":
            return self.conv(x)
        small = x.detach()
        return calling(self.conv, doubled(x), lambda: doubled(small))


class AttentionBlock(nn.Module):
    """Self-attention over pixels: out = (x + proj(attention(qkv(GN(x))))) * residual_scale.

    Raises:
        ValueError: `head_dim` does not divide `channels`.
    """

    def __init__(self, channels: int, *, head_dim: int, num_groups: int, residual_scale: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.residual_scale = _num_heads(channels, head_dim), head_dim, residual_scale
        self.recompute: Recompute = "resampled"
        self.norm = ModulatedGroupNorm(num_groups, channels, activation=None)
        self.qkv = Conv1x1(channels, 3 * channels)
        self.proj = zero_init(Conv1x1(channels, channels))

    def forward(self, x: Image) -> ResidualSum:
        """[N, C, H, W] -> [N, C, H, W]."""
        h = normalized(self.norm, x)
        qkv = pixels_last(_projected(self, self.qkv, x, h)).unflatten(2, (3, self.num_heads, self.head_dim))
        h = self.proj(pixels_first(attention_qkvpacked(qkv).flatten(2), h.shape[2:]))
        return ResidualSum(formed(x), h, self.residual_scale)


class CrossAttentionBlock(nn.Module):
    """Attention from pixels to the tokens of z: out = (x + proj(attention(q(GN(x)), kv(tokens)))) * residual_scale.

    Args:
        token_dim: width of the tokens.

    Raises:
        ValueError: `head_dim` does not divide `channels`.
    """

    def __init__(
        self, channels: int, *, token_dim: int, head_dim: int, num_groups: int, residual_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.residual_scale = _num_heads(channels, head_dim), head_dim, residual_scale
        self.recompute: Recompute = "resampled"
        self.norm = ModulatedGroupNorm(num_groups, channels, activation=None)
        self.q = Conv1x1(channels, channels)
        self.kv = nn.Linear(token_dim, 2 * channels)
        self.proj = zero_init(Conv1x1(channels, channels))

    def forward(self, x: Image, tokens: Tensor) -> ResidualSum:
        """[N, C, H, W] and [N, m + 1, token_dim] -> [N, C, H, W]."""
        h = normalized(self.norm, x)
        q = pixels_last(_projected(self, self.q, x, h)).unflatten(2, (self.num_heads, self.head_dim))
        k, v = self.kv(tokens).unflatten(2, (2, self.num_heads, self.head_dim)).unbind(2)
        h = self.proj(pixels_first(attention(q, k, v).flatten(2), h.shape[2:]))
        return ResidualSum(formed(x), h, self.residual_scale)


class SectionTokens(nn.Module):
    """Turn each section of z into a token: token_i = W_i section_i + e_i, with e_i alone where the section is zeroed.

    Args:
        section_dims: width of each section.
        token_dim: width of the tokens.
    """

    def __init__(self, section_dims: Sequence[int], token_dim: int) -> None:
        super().__init__()
        self.proj = nn.ModuleList(nn.Linear(dim, token_dim, bias=False) for dim in section_dims)
        self.embedding = nn.Parameter(torch.randn(len(section_dims), token_dim) * 0.02)

    def forward(self, sections: Sequence[Tensor]) -> Tensor:
        """m + 1 tensors [N, section_dim] -> [N, m + 1, token_dim]."""
        return torch.stack([proj(s) for proj, s in zip(self.proj, sections, strict=True)], dim=1) + self.embedding


def _projected(block: AttentionBlock | CrossAttentionBlock, conv: nn.Conv2d, x: Image, h: Tensor) -> Tensor:
    """Return conv(h) of h, the block's norm of x."""
    return conv(h) if block.recompute != "norms" else calling(conv, h, renormalized(block.norm, formed(x)))


def _num_heads(channels: int, head_dim: int) -> int:
    if head_dim < 1 or channels % head_dim:
        raise ValueError(f"head_dim is {head_dim}; it must divide the {channels} channels that attend")
    return channels // head_dim
