"""Models written for these tests, with attributes and formulas as the blocks of well-known repositories have them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Norm32(nn.GroupNorm):
    """guided-diffusion's: a group norm in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.group_norm(x.to(wide), self.num_groups, weight, bias, self.eps).to(x.dtype)


class Swish(nn.Module):
    """A SiLU that somebody wrote."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class Conditioned(nn.Module):
    """What guided-diffusion's sequences pass the embedding to."""


class ConditionedSequential(nn.Sequential, Conditioned):
    """A sequence that passes the embedding on to those who take it."""

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, *conditions) if isinstance(layer, Conditioned) else layer(x)
        return x


class AdmResBlock(Conditioned):
    """The structure of guided-diffusion's residual block."""

    def __init__(self, channels: int, out: int, emb: int, *, scale_shift: bool, updown: bool, dropout: float = 0.0):
        super().__init__()
        self.use_scale_shift_norm, self.updown, self.use_checkpoint = scale_shift, updown, False
        self.in_layers = nn.Sequential(Norm32(4, channels), Swish(), nn.Conv2d(channels, out, 3, padding=1))
        self.h_upd = self.x_upd = nn.Upsample(scale_factor=2) if updown else nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(
            Norm32(4, out), Swish(), nn.Dropout(dropout), nn.Conv2d(out, out, 3, padding=1)
        )  # fmt: skip
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint:
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            h = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        emb = self.emb_layers(emb)[..., None, None]
        if self.use_scale_shift_norm:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = emb.chunk(2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class LookalikeBlock(AdmResBlock):
    """Every attribute of an AdmResBlock, and another order: shift first."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, dim=1)
        h = (self.out_layers[0](self.in_layers(x)) + shift) * (1 + scale)
        return self.skip_connection(x) + self.out_layers[1:](h)


class DiffaeResBlock(Conditioned):
    """The structure of DiffAE's residual block: modulated by the time, scaled by the latent."""

    def __init__(self, channels: int, out: int, emb: int, latent: int, *, lateral: bool = False):
        super().__init__()
        self.conf, self.updown = SimpleNamespace(has_lateral=lateral, out_channels=out), False
        self.in_layers = nn.Sequential(Norm32(4, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.cond_emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(latent, out))
        self.out_layers = nn.Sequential(
            Norm32(4, out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1)
        )  # fmt: skip
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(
        self, x: Tensor, emb: Tensor, cond: Tensor | None = None, lateral: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        return self._forward(x, emb, cond, lateral)

    def _forward(self, x: Tensor, emb: Tensor, cond: Tensor | None, lateral: Tensor | None) -> Tensor:
        if self.conf.has_lateral:
            assert lateral is not None
            x = torch.cat([x, lateral], dim=1)
        h = self.out_layers[0](self.in_layers(x))
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
        if cond is not None:
            h = h * (1 + self.cond_emb_layers(cond)[..., None, None])
        return self.skip_connection(x) + self.out_layers[1:](h)


class EdmNorm(nn.Module):
    """EDM's group norm, which is not PyTorch's class."""

    def __init__(self, channels: int, num_groups: int = 4, eps: float = 1e-5):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class EdmUnetBlock(Conditioned):
    """The structure of EDM's block, with attention in it."""

    def __init__(self, channels: int, out: int, emb: int, *, adaptive: bool, num_heads: int, skip_scale: float = 1.0):
        super().__init__()
        self.num_heads, self.dropout, self.skip_scale, self.adaptive_scale = num_heads, 0.0, skip_scale, adaptive
        self.norm0, self.conv0 = EdmNorm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.affine = nn.Linear(emb, 2 * out if adaptive else out)
        self.norm1, self.conv1 = EdmNorm(out, eps=1e-6), nn.Conv2d(out, out, 3, padding=1)
        self.skip = None if channels == out else nn.Conv2d(channels, out, 1)
        if num_heads:
            self.norm2, self.qkv, self.proj = EdmNorm(out), nn.Conv2d(out, 3 * out, 1), nn.Conv2d(out, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h.add_(params)))
        h = self.conv1(F.dropout(h, p=self.dropout, training=self.training))
        h = h.add_(x if self.skip is None else self.skip(x)) * self.skip_scale
        if self.num_heads:
            batch, channels = h.shape[:2]
            packed = self.qkv(self.norm2(h)).reshape(batch * self.num_heads, channels // self.num_heads, 3, -1)
            q, k, v = packed.unbind(2)
            weights = torch.einsum("ncq,nck->nqk", q, k / k.shape[1] ** 0.5).softmax(dim=2)
            mixed = torch.einsum("nqk,nck->ncq", weights, v)
            h = self.proj(mixed.reshape(*h.shape)).add_(h) * self.skip_scale
        return h


class PlainAttention(nn.Module):
    """Attention with a lone group norm before it, as guided-diffusion has it."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.qkv = Norm32(4, channels), nn.Conv1d(channels, 3 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        q, k, v = self.qkv(self.norm(flat)).chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(dim=-1)
        return (flat + v @ weights.transpose(1, 2)).reshape(x.shape)


class Denoiser(nn.Module):
    """A few blocks between two convolutions, called with an image and one or two conditions."""

    def __init__(self, *blocks: nn.Module, channels: int = 8, out: int = 16):
        super().__init__()
        self.entry = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = ConditionedSequential(*blocks)
        self.out = nn.Sequential(Norm32(4, out), nn.SiLU(), nn.Conv2d(out, 3, 3, padding=1))

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        return self.out(self.blocks(self.entry(x), *conditions))


EMB, LATENT = 12, 10

LOOKALIKES: dict[str, tuple[Any, int]] = {
    "guided-diffusion": (lambda: Denoiser(
        AdmResBlock(8, 16, EMB, scale_shift=True, updown=False),
        PlainAttention(16),
        AdmResBlock(16, 16, EMB, scale_shift=True, updown=True),
    ), 2),
    "guided-diffusion without scale_shift": (lambda: Denoiser(
        AdmResBlock(8, 16, EMB, scale_shift=False, updown=True),
        AdmResBlock(16, 16, EMB, scale_shift=False, updown=False),
    ), 0),
    "EDM, adaptive": (lambda: Denoiser(
        EdmUnetBlock(8, 16, EMB, adaptive=True, num_heads=2), EdmUnetBlock(16, 16, EMB, adaptive=True, num_heads=0),
    ), 2),
    "EDM, not adaptive": (lambda: Denoiser(
        EdmUnetBlock(8, 16, EMB, adaptive=False, num_heads=1, skip_scale=0.5**0.5),
    ), 1),
    "DiffAE": (lambda: Denoiser(
        DiffaeResBlock(8, 16, EMB, LATENT), DiffaeResBlock(16, 16, EMB, LATENT),
    ), 2),
}  # fmt: skip
"""Models by the repository whose structure they have, and in how many blocks a kind of their own is found."""
