"""SODA as one writes it in PyTorch alone: the reference path that this engine is timed against.

Nothing of `soda_kernels` runs here. Norms, modulations, activations and residual sums are PyTorch calls one after
another, attention is SDPA, noise is `torch.randn`, the loss is `mse_loss`. It takes its weights from the engine's
modules, as parameters, so that both compute the same function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soda_engine.models.blocks import AttentionBlock, ResidualBlock
from soda_engine.models.encoder import BasicBlock, Bottleneck, ResNetEncoder
from soda_engine.models.modulation import draw_section_mask
from soda_engine.models.soda import Soda
from soda_engine.models.unet import Denoiser, Layer
from soda_kernels import draw_step_index, philox_normal


class Draws(NamedTuple):
    """What a training step draws."""

    step_index: Tensor  # [N] int64
    noise: Tensor  # like the target view
    keep: Tensor  # [N, m + 1], 1 for kept sections of z and 0 for zeroed


class PlainSoda(nn.Module):
    """The training loss, the denoiser and the encoder of a `Soda`, in PyTorch alone.

    Args:
        model: whose encoder and denoiser it takes over.

    Raises:
        ValueError: the model has parts that are not written here.
    """

    def __init__(self, model: Soda) -> None:
        super().__init__()
        if model.config.denoiser.cross_attention or not model.config.denoiser.resample_in_block:
            raise ValueError("the reference path has neither cross-attention nor strided resampling")
        if model.loss_weights is not None:
            raise ValueError("the reference path has no weights of the loss")
        self.encoder, self.denoiser, self.config, self.schedule = (
            model.encoder, model.denoiser, model.config, model.schedule
        )  # fmt: skip
        dtype = next(model.parameters()).dtype
        # In fp64 from the fp32 tables, whose values are what both compute with.
        self.register_buffer("alpha", self.schedule.alpha.to(dtype), persistent=False)
        self.register_buffer("sigma", self.schedule.sigma.to(dtype), persistent=False)
        section_of = torch.cat([
            torch.full((cut.stop - cut.start,), index) for index, cut in enumerate(model.section_slices)
        ])  # fmt: skip
        self.register_buffer("section_of", section_of.to(model.device), persistent=False)
        self.slices = model.section_slices

    def draw(self, target: Tensor) -> Draws:
        """Draw step indices, noise and masks for target views."""
        count, latent = len(target), self.config.latent
        keep_any = torch.rand(count, 1, device=target.device) >= latent.drop_all
        keep = keep_any & (torch.rand(count, len(self.slices), device=target.device) >= latent.drop_section)
        steps = torch.randint(self.config.diffusion.num_steps, (count,), device=target.device)
        return Draws(steps, torch.randn_like(target), keep.to(target.dtype))

    def forward(self, source: Tensor, target: Tensor, draws: Draws) -> Tensor:
        """Return the loss of each sample, [N], uniform over step indices."""
        x_t, goal = self.noised(target, draws)
        z = self.encode(source)
        prediction = self.denoise(x_t, draws.step_index, z * draws.keep[:, self.section_of])
        wide = torch.promote_types(prediction.dtype, torch.float32)
        return F.mse_loss(prediction.to(wide), goal.to(wide), reduction="none").mean(dim=(1, 2, 3))

    def noised(self, target: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return the noisy target views and what the denoiser should say of them."""
        alpha, sigma = (table[draws.step_index].view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        x_t = alpha * target + sigma * draws.noise
        name = self.config.diffusion.target
        return x_t, {"eps": draws.noise, "x0": target}.get(name, alpha * draws.noise - sigma * target)

    def encode(self, x: Tensor) -> Tensor:
        """Encode source views, [N, C, S, S] -> [N, d]."""
        encoder: ResNetEncoder = self.encoder
        h = F.relu(encoder.bn1(_conv(encoder.conv1, x)), inplace=True)
        if encoder.config.stem == "imagenet":
            h = F.max_pool2d(h, 3, stride=2, padding=1)
        for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
            for block in stage:
                h = _resnet_block(block, h)
        return encoder.fc(h.mean((2, 3)))

    def denoise(self, x_t: Tensor, step_index: Tensor, z: Tensor) -> Tensor:
        """Predict the target from noisy images [N, C, S, S], steps [N] and masked z [N, d]."""
        denoiser: Denoiser = self.denoiser
        time = denoiser.time((step_index + 1).to(x_t.dtype) / self.config.diffusion.num_steps)
        sections = [z[:, cut] for cut in self.slices]
        h = _conv(denoiser.conv_in, x_t)
        skips = [h]
        for layer in denoiser.down:
            h = _layer(layer, h, time, sections)
            skips.append(h)
        for layer in denoiser.middle:
            h = _layer(layer, h, time, sections)
        for layer in denoiser.up:
            h = _layer(layer, torch.cat((h, skips.pop()), dim=1) if layer.takes_skip else h, time, sections)
        return _conv(denoiser.conv_out, F.silu(_group_norm(denoiser.norm_out, h)))

    def sample(self, z: Tensor, x_t: Tensor, indices: list[int], denoise: nn.Module | None = None) -> Tensor:
        """Make images by DDIM with clipped x0, as sampling scripts do.

        Args:
            z: [N, d]. x_t: [N, C, S, S], noise at the first index. indices: of the steps, falling.
            denoise: `self.denoise` unless another is given, such as a compiled one.
        """
        call = denoise or self.denoise
        for index, next_index in zip(indices, [*indices[1:], -1], strict=True):
            prediction = call(x_t, torch.full((len(x_t),), index, device=x_t.device), z)
            x_t = self.ddim_step(x_t, prediction.to(x_t.dtype), index, next_index)
        return x_t

    def ddim_step(self, x_t: Tensor, prediction: Tensor, index: int, next_index: int) -> Tensor:
        """Step to the next index; -1 is the clean end."""
        alpha, sigma, target = self.alpha[index], self.sigma[index], self.config.diffusion.target
        if target == "eps":
            x0 = (x_t - sigma * prediction) / alpha
        else:
            x0 = prediction if target == "x0" else alpha * x_t - sigma * prediction
        x0 = x0.clamp(-1, 1)
        if next_index < 0:
            return x0
        return self.alpha[next_index] * x0 + self.sigma[next_index] * ((x_t - alpha * x0) / sigma)


def keyed_draws(model: PlainSoda, target: Tensor, *, seed: int, sample_ids: Tensor, step: int) -> Draws:
    """Return the draws that this engine makes for the same key, to compare results on."""
    latent, key = model.config.latent, {"seed": seed, "sample_ids": sample_ids, "step": step}
    steps = draw_step_index(model.schedule, **key)
    noise = philox_normal(tuple(target.shape), stream="noise", device=target.device, **key)
    keep = draw_section_mask(len(model.slices), latent.drop_all, latent.drop_section, **key)
    # Added to zeros, noise takes the layout that randn_like gives it.
    return Draws(steps, torch.zeros_like(target) + noise, keep.to(target.dtype))


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """PyTorch's convolution, of a module that may call this project's."""
    return nn.Conv2d.forward(conv, x)


def _layer(layer: Layer, x: Tensor, time: Tensor, sections: list[Tensor]) -> Tensor:
    h = _residual_block(layer.block, x, time, sections[layer.section])
    return h if layer.attention is None else _attention(layer.attention, h)


def _residual_block(block: ResidualBlock, x: Tensor, time: Tensor, section: Tensor) -> Tensor:
    h = _conv(block.conv1, _resampled(block, F.silu(_group_norm(block.norm1, x))))
    h = _group_norm(block.norm2, h)
    for projection, by in ((block.time_proj, time), (block.z_proj, section)):
        scale, shift = projection(by)[:, :, None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
    h = F.dropout(F.silu(h), block.norm2.dropout_p, block.training)
    x = _resampled(block, x)
    return (_conv(block.conv2, h) + (x if block.shortcut is None else _conv(block.shortcut, x))) * block.residual_scale


def _resampled(block: ResidualBlock, x: Tensor) -> Tensor:
    if block.resample == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if block.resample == "up" else x


def _attention(block: AttentionBlock, x: Tensor) -> Tensor:
    sides = x.shape[2:]
    qkv = _conv(block.qkv, _group_norm(block.norm, x)).flatten(2).unflatten(1, (3, block.num_heads, block.head_dim))
    q, k, v = qkv.transpose(-1, -2).unbind(1)  # [N, heads, H * W, head_dim]
    o = F.scaled_dot_product_attention(q, k, v)
    if x.is_contiguous():
        o = o.transpose(-1, -2).reshape(x.shape)
    else:  # as a view of what SDPA wrote, which is channels_last
        o = o.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, sides)
    return (x + _conv(block.proj, o)) * block.residual_scale


def _resnet_block(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    h = F.relu(block.bn1(_conv(block.conv1, x)), inplace=True)
    h = block.bn2(_conv(block.conv2, h))
    if isinstance(block, Bottleneck):
        h = block.bn3(block.conv3(F.relu(h, inplace=True)))
    return F.relu(h + (x if block.downsample is None else block.downsample(x)), inplace=True)
