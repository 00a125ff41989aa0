"""Attention of diffusers: a processor that reads packed projections, and the module that chooses it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from soda_kernels.attention.api import attention, attention_qkvpacked
from soda_kernels.integrations.replacement import Fused


class SodaAttnProcessor:
    """A processor for `Attention.set_processor`, which computes what `AttnProcessor2_0` does.

    Args:
        packed: read q, k and v from the one projection that `fuse_qkv_projections` makes, and k and v of
            cross-attention from theirs. It computes then what `FusedAttnProcessor2_0` does.
    """

    def __init__(self, *, packed: bool = False) -> None:
        self.packed = packed

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            attn: the `Attention` module.
            hidden_states: [B, T, C], or an image [B, C, H, W].
            encoder_hidden_states: [B, S, D] for cross-attention.
            attention_mask: None; the kernels take no mask.
            temb: what a `SpatialNorm` is given.

        Raises:
            ValueError: there is a mask, or the module is one of those that `why_left` names.
        """
        reason = "there is an attention mask" if attention_mask is not None else why_left(attn)
        if reason:
            raise ValueError(f"SodaAttnProcessor cannot run: {reason}; set diffusers' own processor for this module")
        residual = hidden = hidden_states
        if attn.spatial_norm is not None:
            hidden = attn.spatial_norm(hidden, temb)
        hidden = _tokens(attn.group_norm, hidden)
        mixed = self._attend(attn, hidden, encoder_hidden_states)
        hidden = attn.to_out[1](attn.to_out[0](mixed.flatten(2)))
        if residual.ndim == 4:
            hidden = hidden.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            hidden = residual + hidden  # in this order, so that the sum has the image's layout
        return hidden if attn.rescale_output_factor == 1.0 else hidden / attn.rescale_output_factor

    def _attend(self, attn: Any, hidden: Tensor, context: Tensor | None) -> Tensor:
        heads = attn.heads
        if context is None and self.packed:
            return attention_qkvpacked(attn.to_qkv(hidden).unflatten(-1, (3, heads, -1)))
        q = attn.to_q(hidden).unflatten(-1, (heads, -1))
        if context is None:
            context = hidden
        elif attn.norm_cross is not None:
            context = attn.norm_encoder_hidden_states(context)
        if self.packed:
            k, v = attn.to_kv(context).unflatten(-1, (2, heads, -1)).unbind(2)
        else:
            k, v = (project(context).unflatten(-1, (heads, -1)) for project in (attn.to_k, attn.to_v))
        return attention(q, k, v)


def _tokens(group_norm: nn.Module | None, hidden: Tensor) -> Tensor:
    """Normalize, and return [B, T, C]. An image is normalized as one, in its own layout."""
    if hidden.ndim == 4:
        image = hidden if group_norm is None else group_norm(hidden)
        return image.flatten(2).transpose(1, 2)
    return hidden if group_norm is None else group_norm(hidden.transpose(1, 2)).transpose(1, 2)


def why_left(attn: Any) -> str | None:
    """Say why these kernels cannot compute a module's attention, or None."""
    if attn.norm_q is not None or attn.norm_k is not None:
        return "it normalizes queries and keys"
    if attn.added_kv_proj_dim is not None:
        return "it has added keys and values"
    if attn.inner_kv_dim != attn.inner_dim:
        return "several heads share their keys"
    if attn.to_out is None:
        return "it has no output projection"
    return None


_PACKED, _SEPARATE = SodaAttnProcessor(packed=True), SodaAttnProcessor()
_IN_PLACE_OF = {"AttnProcessor2_0": _SEPARATE, "FusedAttnProcessor2_0": _PACKED}


def replacing(processor: object) -> SodaAttnProcessor | None:
    """Return the processor that runs in place of one of diffusers', or None where that runs itself."""
    ours = _IN_PLACE_OF.get(type(processor).__name__)
    return ours if ours and type(processor).__module__.startswith("diffusers.") else None


class Attention(Fused):
    """Its `Attention`. Its processor stays the one that was set, now or later; ours run in place of two of them."""

    label = "attention"
    processor: Any

    def fused_forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        ours = replacing(self.processor)
        if ours is None or attention_mask is not None or kwargs.keys() - {"temb"}:
            return self.plain_class.forward(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        return ours(self, hidden_states, encoder_hidden_states, None, **kwargs)
