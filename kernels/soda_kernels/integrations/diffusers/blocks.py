"""What replaced blocks of diffusers compute: the same as theirs, with norm, modulation, SiLU and dropout in one op."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from soda_kernels.integrations.norms import drop_probability, normalize
from soda_kernels.integrations.replacement import Fused


class AdaGroupNorm(Fused):
    """Its `AdaGroupNorm`: a group norm without weights, modulated by a projection of the embedding."""

    label = "adaptive group norm"
    act: nn.Module | None
    linear: nn.Module
    num_groups: int
    eps: float

    def fused_forward(
        self, x: Tensor, emb: Tensor, *, activation: str | None = None, dropout_p: float = 0.0
    ) -> Tensor:  # fmt: skip
        scale, shift = self.linear(self.act(emb) if self.act else emb).chunk(2, dim=1)
        return normalize(x, self.num_groups, None, None, ((scale, shift),), self.eps, activation, dropout_p)


class _Block(Fused):
    """What both kinds of residual block share. Replaced norms are asked for the SiLU; theirs comes from the block."""

    label = "residual block"
    norm1: nn.Module
    conv1: nn.Module
    norm2: nn.Module
    conv2: nn.Module
    nonlinearity: nn.Module
    dropout: nn.Module
    upsample: Any
    downsample: Any
    conv_shortcut: nn.Module | None
    output_scale_factor: float

    def resample_and_convolve(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's input and its first convolution's output, both at the new size."""
        if self.upsample is not None:
            if hidden.shape[0] >= 64:  # as diffusers does, whose issue 984 tells why
                x, hidden = x.contiguous(), hidden.contiguous()
            x, hidden = self.upsample(x), self.upsample(hidden)
        elif self.downsample is not None:
            x, hidden = self.downsample(x), self.downsample(hidden)
        return x, self.conv1(hidden)

    def activate_and_add(self, x: Tensor, hidden: Tensor, *conditions: Any) -> Tensor:
        """Run the second half: norm with its conditions, SiLU, dropout, convolution, sum."""
        dropout_p = drop_probability(self.dropout)
        hidden = self.norm2(hidden, *conditions, activation="silu", dropout_p=dropout_p or 0.0)
        if dropout_p is None:
            hidden = self.dropout(hidden)
        hidden = self.conv2(hidden)
        # diffusers copies a channels-last x to the other layout here while it trains, for the strides of DDP's buckets.
        summed = x + hidden if self.conv_shortcut is None else self.conv_shortcut(x) + hidden
        return summed if self.output_scale_factor == 1.0 else summed / self.output_scale_factor


class ResnetBlock2D(_Block):
    """Its `ResnetBlock2D`, of both `time_embedding_norm`."""

    time_emb_proj: nn.Module | None
    time_embedding_norm: str
    skip_time_act: bool

    def fused_forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        x, hidden = self.resample_and_convolve(input_tensor, self.norm1(input_tensor, activation="silu"))
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            if temb is None:
                raise ValueError("temb is None; a block whose time_embedding_norm is 'scale_shift' needs one")
            scale, shift = temb.chunk(2, dim=1)
            return self.activate_and_add(x, hidden, ((scale, shift),))
        if self.time_embedding_norm == "default" and temb is not None:
            hidden = hidden + temb[:, :, None, None]
        return self.activate_and_add(x, hidden)


class ResnetBlockCondNorm2D(_Block):
    """Its `ResnetBlockCondNorm2D` with `AdaGroupNorm`s."""

    def fused_forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, hidden = self.resample_and_convolve(input_tensor, self.norm1(input_tensor, temb, activation="silu"))
        return self.activate_and_add(x, hidden, temb)
