"""The denoiser: ADM's U-Net, whose blocks the time step and their section of z modulate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soda_engine.config import DenoiserConfig, LatentConfig
from soda_engine.models.blocks import (
    AttentionBlock,
    ConvResample,
    CrossAttentionBlock,
    ResidualBlock,
    SectionTokens,
    zero_init,
)
from soda_engine.models.convolution import Conv3x3
from soda_engine.models.modulation import (
    Modulation,
    TimeEmbedding,
    build_section_map,
    mask_sections,
    section_slices,
)
from soda_engine.models.recomputation import Recompute, calling, renormalized
from soda_engine.models.residual import Image, ResidualSum, formed, normalized
from soda_kernels import ModulatedGroupNorm


class Condition(NamedTuple):
    """What every layer may look at besides its input; residual blocks count in the order they run."""

    by_time: Sequence[Modulation]  # one a residual block
    by_section: Sequence[Modulation]  # one a residual block, zero where its section of z is masked
    tokens: Tensor | None  # [N, m + 1, token_dim], for cross-attention
    seed: Tensor | None = None  # [N] int64, for dropout


class Layer(nn.Module):
    """A residual block, which section `section` modulates, and the attention that follows it."""

    def __init__(
        self, index: int, section: int, block: ResidualBlock, attention: AttentionBlock | None,
        cross: CrossAttentionBlock | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.index, self.section, self.block, self.attention, self.cross = index, section, block, attention, cross
        self.takes_skip = block.skip_channels > 0

    def forward(self, x: Image | tuple[Tensor, Tensor], condition: Condition) -> ResidualSum:
        """[N, C_in, H, W], or a pair (h, skip) -> [N, C_out, H', W']."""
        h = self.block(x, condition.by_time[self.index], condition.by_section[self.index], condition.seed)
        if self.attention is not None:
            h = self.attention(h)
        return h if self.cross is None else self.cross(h, condition.tokens)


class Denoiser(nn.Module):
    """Predict the denoising target from a noisy image, its time, and z.

    Down: an input convolution, then at each level `blocks` residual blocks and a resampling to the next; each output is
    a skip. Middle: two residual blocks. Up: at each level `blocks + 1` residual blocks that take the skips in reverse,
    then a resampling. Where a level's side is in `attention_resolutions`, attention follows each of its residual blocks
    and the first of the middle's, but no resampling block; a side that no level has is ignored. The last convolution
    starts from zero, so an untrained denoiser predicts zero.

    Args:
        config: the architecture.
        latent: width of z and how its sections pair with blocks.

    Raises:
        ValueError: the image's side, the groups, the heads or the sections do not divide as they must.

    Reference:
        Dhariwal and Nichol 2021 (ADM); Hudson et al. 2023 (layer modulation).
    """

    def __init__(self, config: DenoiserConfig, latent: LatentConfig) -> None:
        super().__init__()
        _check(config)
        section_map = build_section_map(config, latent.pairing)
        self.config, self.latent_dim = config, latent.dim
        self.section_names = section_map.names
        self.section_slices = section_slices(latent.dim, len(section_map.names))
        section_dims = [cut.stop - cut.start for cut in self.section_slices]
        time_dim = 4 * config.channels
        shared: dict[str, Any] = {"num_groups": config.num_groups, "residual_scale": config.residual_scale}
        count = itertools.count()

        def layer(section: int, level: int, channels: int, width: int, *, attend: bool = True, **options: Any) -> Layer:
            index = next(count)
            block = ResidualBlock(
                channels, width, time_dim=time_dim, section_dim=section_dims[section], dropout=config.dropout,
                index=index, **shared, **options,
            )  # fmt: skip
            attention = cross = None
            if attend and config.image_size >> level in config.attention_resolutions:
                attention = AttentionBlock(width, head_dim=config.head_dim, **shared)
                if config.cross_attention:
                    cross = CrossAttentionBlock(width, token_dim=time_dim, head_dim=config.head_dim, **shared)
            return Layer(index, section, block, attention, cross)

        def resampling(
            sections: Iterator[int], level: int, channels: int, resample: Literal["down", "up"]
        ) -> nn.Module:
            if not config.resample_in_block:
                return ConvResample(channels, resample)
            return layer(next(sections), level, channels, channels, attend=False, resample=resample)

        self.time = TimeEmbedding(config.channels, time_dim)
        self.tokens = SectionTokens(section_dims, time_dim) if config.cross_attention else None
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.conv_in = Conv3x3(config.in_channels, widths[0])
        channels, skips = widths[0], [widths[0]]
        last, sections = len(widths) - 1, iter(section_map.down)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(layer(next(sections), level, channels, width))
                channels = width
                skips.append(channels)
            if level < last:
                self.down.append(resampling(sections, level, channels, "down"))
                skips.append(channels)

        middle = len(section_map.names) - 1
        self.middle = nn.ModuleList(layer(middle, last, channels, channels, attend=first) for first in (True, False))

        sections = iter(section_map.up)
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(layer(next(sections), level, channels, width, skip_channels=skips.pop()))
                channels = width
            if level > 0:
                self.up.append(resampling(sections, level, channels, "up"))
        self.norm_out = ModulatedGroupNorm(config.num_groups, channels)
        self._keeps = "none"
        self.conv_out = zero_init(Conv3x3(channels, config.in_channels))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor | None = None,
        z: Tensor | None = None,
        *,
        section_mask: Tensor | None = None,
        seed: Tensor | None = None,
        condition: Condition | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x_t: [N, C, S, S], the noisy target view.
            t: [N] in [0, 1].
            z: [N, d].
            section_mask: [m + 1], [1, m + 1] or [N, m + 1], 1 for kept and 0 for zeroed; None keeps all of z.
            seed: [N] int64, one dropout key a sample, on which alone its dropout depends; needed in training mode with
                dropout, and unused elsewhere.
            condition: of `condition`, in place of all but x_t.

        Returns:
            [N, C, S, S], the predicted eps, v or x0.

        Raises:
            ValueError: an argument has another shape, is missing, or came beside a condition.
        """
        side = self.config.image_size
        _check_shape("x_t", x_t, (len(x_t), self.config.in_channels, side, side))
        if condition is None:
            condition = self._condition(len(x_t), t, z, section_mask, seed)
        elif not all(each is None for each in (t, z, section_mask, seed)):
            raise ValueError("condition came with t, z, section_mask or seed, which it stands for; leave those out")
        elif len(condition.by_time[0][0]) != len(x_t):
            raise ValueError(f"condition is of {len(condition.by_time[0][0])} samples; x_t has {len(x_t)}")
        h = self.conv_in(x_t)
        skips = [h]
        for layer in self.down:
            h = self._run(layer, h, condition)
            skips.append(h)
        for layer in self.middle:
            h = self._run(layer, h, condition)
        for layer in self.up:
            h = self._run(layer, (formed(h), formed(skips.pop())) if layer.takes_skip else h, condition)
        y = normalized(self.norm_out, h)
        return self.conv_out(y) if self._keeps == "none" else calling(
            self.conv_out, y, renormalized(self.norm_out, formed(h))
        )  # fmt: skip

    def time_table(self, times: Tensor) -> Tensor:
        """Project times for every residual block, as `condition` takes them.

        Args:
            times: [T] in [0, 1].

        Returns:
            [T, 2 * the blocks' channels together]: scale and shift of the first block to run, of the next, and so on.
        """
        _check_shape("times", times, (times.numel(),))
        time = self.time(times)
        return torch.cat([layer.block.time_proj(time) for layer in self._layers()], dim=1)

    def condition(self, z: Tensor, *, section_mask: Tensor | None = None) -> Callable[[Tensor], Condition]:
        """Project z for a whole sampling loop, and return what makes the condition of each step.

        In a loop z stays, and all samples are at one time. So each block projects z once, and each time once instead of
        for every sample. Sampling 64 images of `digits` on two EPYC cores then took 0.82 to 0.93 of the time.

        Args:
            z, section_mask: as in `forward`.

        Returns:
            A function from a row of `time_table`, [1, ...], to the condition of all samples, who are at its time.

        Raises:
            ValueError: z or the mask has another shape.
        """
        by_section, tokens = self._of_z(z, section_mask)
        widths = [layer.block.out_channels for layer in self._layers() for _ in range(2)]

        def at(row: Tensor) -> Condition:
            parts = row.expand(len(z), -1).split(widths, dim=1)
            return Condition(list(zip(parts[::2], parts[1::2], strict=True)), by_section, tokens)

        return at

    def checkpoint_activations(self, what: Literal["none", "norms", "blocks"]) -> None:
        """Let the backward compute again what it needs, instead of keeping it; results stay the same to the bit.

        Args:
            what: "norms", what norms return; "blocks", all but the inputs of the residual blocks with their attention;
                "none".

        Raises:
            ValueError: it is something else.
        """
        choices: dict[str, Recompute] = {"none": "resampled", "norms": "norms", "blocks": "nothing"}
        if what not in choices:
            raise ValueError(f"checkpoint_activations is {what!r}; it must be one of {list(choices)}")
        self._keeps = what
        for module in self.modules():
            if isinstance(module, ResidualBlock | AttentionBlock | CrossAttentionBlock):
                module.recompute = choices[what]

    def _run(self, layer: nn.Module, x: Image | tuple[Tensor, Tensor], condition: Condition) -> Image:
        if self._keeps != "blocks" or not isinstance(layer, Layer) or not torch.is_grad_enabled():
            return layer(x, condition)
        # Dropout is a function of its keys, so that no state of a generator has to be put back.
        return checkpoint(layer, x, condition, use_reentrant=False, preserve_rng_state=False)

    def _condition(
        self, batch: int, t: Tensor | None, z: Tensor | None, section_mask: Tensor | None, seed: Tensor | None
    ) -> Condition:
        for name, value in (("t", t), ("z", z)):
            if value is None:
                raise ValueError(f"{name} is None; give t and z, or a condition")
        assert t is not None and z is not None
        if not self.training or self.config.dropout == 0.0:
            seed = None
        elif seed is None:
            raise ValueError("seed is None; training with dropout needs one int64 key a sample, or call eval()")
        _check_shape("t", t, (batch,))
        _check_shape("z", z, (batch, self.latent_dim))
        if seed is not None:
            _check_shape("seed", seed, (batch,))
        by_section, tokens = self._of_z(z, section_mask)
        time = self.time(t)
        return Condition([layer.block.time_modulation(time) for layer in self._layers()], by_section, tokens, seed)

    def _of_z(self, z: Tensor, section_mask: Tensor | None) -> tuple[list[Modulation], Tensor | None]:
        """Return how the sections of z modulate each block, and the tokens made of them."""
        _check_shape("z", z, (len(z), self.latent_dim))
        if section_mask is not None:
            z = mask_sections(z, section_mask, self.section_slices)
        sections = [z[:, cut] for cut in self.section_slices]
        by_section = [layer.block.section_modulation(sections[layer.section]) for layer in self._layers()]
        return by_section, None if self.tokens is None else self.tokens(sections)

    def _layers(self) -> Iterator[Layer]:
        """Yield the residual blocks with their attention, in the order they run."""
        for layer in itertools.chain(self.down, self.middle, self.up):
            if isinstance(layer, Layer):
                yield layer


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}")


def _check(config: DenoiserConfig) -> None:
    """Raise a ValueError that names the first field of `config` that does not fit the others."""
    if not config.multipliers or min(config.multipliers) < 1:
        raise ValueError(f"multipliers is {config.multipliers}; it must hold one positive number a level")
    for name in ("in_channels", "image_size", "channels", "blocks", "num_groups", "head_dim"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    factor = 2 ** (len(config.multipliers) - 1)
    if config.image_size % factor:
        raise ValueError(
            f"image_size is {config.image_size}; with {len(config.multipliers)} levels it must be divisible by {factor}"
        )
    sides = [config.image_size >> level for level in range(len(config.multipliers))]
    if config.cross_attention and not set(sides) & set(config.attention_resolutions):
        raise ValueError(
            f"attention_resolutions is {config.attention_resolutions}; with cross_attention it must have one of {sides}"
        )
    for multiplier in config.multipliers:
        channels = config.channels * multiplier
        if channels % config.num_groups:
            raise ValueError(
                f"num_groups is {config.num_groups}; it must divide the {channels} channels "
                f"(channels {config.channels} times multiplier {multiplier})"
            )
