"""The denoiser and its blocks: shapes, layouts, modulation by sections, initialization, dropout, and errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soda_engine.config import DenoiserConfig, LatentConfig
from soda_engine.models.blocks import AttentionBlock, CrossAttentionBlock, ResidualBlock, SectionTokens
from soda_engine.models.convolution import Conv1x1
from soda_engine.models.modulation import build_section_map
from soda_engine.models.residual import Image, ResidualSum, formed
from soda_engine.models.unet import Denoiser, Layer

TINY = DenoiserConfig(
    image_size=8, channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), head_dim=8, num_groups=4
)
LATENT = LatentConfig(dim=16)


def build(pairing: str = "level", *, random: bool = True, dim: int = 16, **options: Any) -> Denoiser:
    """Build a tiny denoiser in eval mode; `random` replaces what is zero-initialized."""
    model = Denoiser(dataclasses.replace(TINY, **options), LatentConfig(dim=dim, pairing=pairing)).eval()
    if random:
        randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)


def inputs(model: Denoiser, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    side = model.config.image_size
    x_t = torch.randn(batch, model.config.in_channels, side, side)
    return x_t, torch.rand(batch), torch.randn(batch, model.latent_dim)


def layers(model: Denoiser) -> list[Layer]:
    return [module for module in model.modules() if isinstance(module, Layer)]


SHAPES: dict[str, dict[str, Any]] = {
    "8px-1level-1ch": {"multipliers": (1,), "in_channels": 1, "attention_resolutions": (8,)},
    "8px-4levels-to-1px": {"multipliers": (1, 1, 2, 2), "attention_resolutions": (1, 2)},
    "12px-odd-multipliers": {"image_size": 12, "multipliers": (3, 1, 5), "attention_resolutions": (3,)},
    "16px-9ch-blocks2": {"image_size": 16, "in_channels": 9, "blocks": 2},
    "16px-conv": {"image_size": 16, "resample_in_block": False},
    "28px-cross": {"image_size": 28, "attention_resolutions": (14,), "cross_attention": True},
    "128px": {"image_size": 128, "multipliers": (1, 1, 2), "attention_resolutions": ()},
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", SHAPES)
def test_shapes_and_layouts(case: str, layout: torch.memory_format) -> None:
    model = build(**SHAPES[case]).to(memory_format=layout)
    seen = [
        module.register_forward_hook(lambda module, args, output: outputs.append((module, output)))
        for module in model.modules()
        if isinstance(module, ResidualBlock | AttentionBlock | CrossAttentionBlock | Layer)
    ]
    outputs: list[tuple[nn.Module, ResidualSum]] = []
    x_t, t, z = inputs(model)
    x_t = x_t.contiguous(memory_format=layout)
    y = model(x_t, t, z)
    assert y.shape == x_t.shape and y.is_contiguous(memory_format=layout) and y.isfinite().all()
    assert len(outputs) == len(seen)
    for module, left in outputs:
        output = left.tensor()
        assert output.is_contiguous(memory_format=layout), type(module).__name__
        if output.shape[1] > 1 and output.shape[2] > 1:
            other = torch.channels_last if layout is torch.contiguous_format else torch.contiguous_format
            assert not output.is_contiguous(memory_format=other), type(module).__name__


@pytest.mark.parametrize("in_channels", [1, 3])
def test_no_layer_is_fed_another_layout(in_channels: int) -> None:
    model = build(in_channels=in_channels).to(memory_format=torch.channels_last)
    fed: list[Image] = []
    for layer in layers(model):
        layer.register_forward_pre_hook(lambda _, args: fed.extend(args[0] if isinstance(args[0], tuple) else args[:1]))
    x_t, t, z = inputs(model)
    model(x_t.contiguous(memory_format=torch.channels_last), t, z)
    assert len(fed) == len(layers(model)) + 4, "one input a layer, and one skip for each of four"
    assert all(formed(image).is_contiguous(memory_format=torch.channels_last) for image in fed)


def test_layouts_agree() -> None:
    model = build(cross_attention=True).double()
    x_t, t, z = (tensor.double() for tensor in inputs(model))
    plain = model(x_t, t, z)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x_t.contiguous(memory_format=torch.channels_last), t, z), plain)


def test_skips_are_those_of_adm() -> None:
    # Channels 8, 16 and 8 at 16, 8 and 4 px: the down path leaves 8 (input), 8, 8 | 16, 16 | 8, taken in reverse.
    model = build(image_size=16, multipliers=(1, 2, 1), attention_resolutions=())
    up = [(layer.block.in_channels, layer.block.skip_channels) for layer in model.up if layer.takes_skip]
    assert up == [(8, 8), (8, 16), (8, 16), (16, 8), (16, 8), (8, 8)]
    assert [layer.block.resample for layer in model.down] == [None, "down", None, "down", None]
    assert [layer.block.resample for layer in model.up] == [None, None, "up", None, None, "up", None, None]


def test_attention_only_where_asked() -> None:
    model = build(multipliers=(1, 2, 2), attention_resolutions=(4,), blocks=2)
    assert [layer.attention is not None for layer in model.down] == [False] * 3 + [True, True, False] + [False] * 2
    assert not any(layer.attention is not None for layer in model.middle)
    assert [layer.attention is not None for layer in build(attention_resolutions=(4,)).middle] == [True, False]
    assert not any(isinstance(module, AttentionBlock) for module in build(attention_resolutions=()).modules())


def test_untrained_denoiser_predicts_zero_and_its_blocks_pass_their_input_on() -> None:
    model = build(random=False, attention_resolutions=(8, 4), cross_attention=True)
    assert (model(*inputs(model)) == 0).all()
    x = torch.randn(2, 8, 8, 8)
    layer = model.down[0]
    block = layer.block
    modulations = block.time_modulation(torch.randn(2, 32)), block.section_modulation(torch.randn(2, 5))
    for module in (layer.attention, lambda x: layer.cross(x, torch.randn(2, 3, 32))):
        torch.testing.assert_close(module(x).tensor(), x * 2**-0.5)
    torch.testing.assert_close(block(x, *modulations).tensor(), x * 2**-0.5)


@pytest.mark.parametrize("pairing", ["level", "block"])
def test_untrained_modulation_is_the_identity(pairing: str) -> None:
    model = build(pairing, random=False)
    checked = 0

    def check(norm: nn.GroupNorm, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal checked
        checked += 1
        assert len(args) == 3, "the input and two modulations"
        plain = F.silu(F.group_norm(args[0], norm.num_groups, norm.weight, norm.bias, norm.eps))
        torch.testing.assert_close(output, plain)

    for layer in layers(model):
        nn.init.normal_(layer.block.norm2.weight)
        nn.init.normal_(layer.block.norm2.bias)
        layer.block.norm2.register_forward_hook(check)
    model(*inputs(model))
    assert checked == len(layers(model)) > 0


@pytest.mark.parametrize("cross_attention", [False, True], ids=["modulation", "cross"])
@pytest.mark.parametrize("pairing", ["level", "block"])
def test_masking_a_section_is_zeroing_it(pairing: str, cross_attention: bool) -> None:
    model = build(pairing, cross_attention=cross_attention)
    x_t, t, z = inputs(model)
    whole = model(x_t, t, z)
    for index, cut in enumerate(model.section_slices):
        mask = torch.ones(len(model.section_names))
        mask[index] = 0
        zeroed = z.clone()
        zeroed[:, cut] = 0
        masked = model(x_t, t, z, section_mask=mask)
        assert torch.equal(masked, model(x_t, t, zeroed))
        assert not torch.allclose(masked, whole)
        only_first = model(x_t, t, z, section_mask=torch.stack((mask, torch.ones_like(mask))))
        torch.testing.assert_close(only_first, torch.stack((masked[0], whole[1])))
    everything = model(x_t, t, z, section_mask=torch.zeros(1, len(model.section_names)))
    assert torch.equal(everything, model(x_t, t, torch.zeros_like(z)))


def test_masked_modulation_is_that_of_time_alone() -> None:
    model = build()
    for layer in layers(model):
        assert (layer.block.z_proj(torch.zeros(1, layer.block.z_proj.in_features)) == 0).all()


@pytest.mark.parametrize("in_block", [True, False], ids=["resblock", "conv"])
@pytest.mark.parametrize("pairing", ["level", "block"])
def test_a_block_sees_its_own_section_alone(pairing: str, in_block: bool) -> None:
    model = build(pairing, resample_in_block=in_block)
    modulations: dict[Layer, Tensor] = {}
    for layer in layers(model):
        layer.block.z_proj.register_forward_hook(
            lambda _, args, output, layer=layer: modulations.__setitem__(layer, output)
        )
    x_t, t, z = inputs(model)
    model(x_t, t, z.requires_grad_())
    section_map = build_section_map(model.config, pairing)
    middle = len(section_map.names) - 1
    expected = [*section_map.down, middle, middle, *section_map.up]
    running = [layer for path in (model.down, model.middle, model.up) for layer in path if isinstance(layer, Layer)]
    assert len(running) == len(expected)
    for layer, section in zip(running, expected, strict=True):
        (gradient,) = torch.autograd.grad(modulations[layer].sum(), z, retain_graph=True)
        touched = (gradient != 0).any(0).nonzero().flatten().tolist()
        assert touched == list(range(16))[model.section_slices[section]]


@pytest.mark.parametrize(
    ("resample", "skip_channels"), [(None, 0), (None, 4), ("down", 0), ("up", 0)], ids=["plain", "pair", "down", "up"]
)
@pytest.mark.parametrize("out_channels", [8, 12])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_residual_block_is_its_formula(
    layout: torch.memory_format, out_channels: int, resample: Any, skip_channels: int
) -> None:
    block = ResidualBlock(
        8, out_channels, time_dim=6, section_dim=5, num_groups=4, skip_channels=skip_channels, resample=resample,
        residual_scale=0.5,
    ).double()  # fmt: skip
    randomize(block)
    h, skip = (
        torch.randn(2, channels, 6, 4).double().contiguous(memory_format=layout) for channels in (8, skip_channels)
    )
    time, section = torch.randn(2, 6).double(), torch.randn(2, 5).double()
    x = torch.cat((h, skip), 1)

    def resampled(x: Tensor) -> Tensor:
        if resample == "down":
            return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else x

    y = F.conv2d(resampled(F.silu(norm(block.norm1, x))), block.conv1.weight, block.conv1.bias, padding=1)
    t_scale, t_shift = (time @ block.time_proj.weight.T + block.time_proj.bias)[..., None, None].chunk(2, 1)
    z_scale, z_shift = (section @ block.z_proj.weight.T)[..., None, None].chunk(2, 1)
    y = (1 + z_scale) * ((1 + t_scale) * norm(block.norm2, y) + t_shift) + z_shift
    y = F.conv2d(F.silu(y), block.conv2.weight, block.conv2.bias, padding=1)
    shortcut = resampled(x)
    if block.shortcut is not None:
        shortcut = F.conv2d(shortcut, block.shortcut.weight, block.shortcut.bias)
    assert (block.shortcut is None) == (out_channels == 8 and not skip_channels)
    modulations = block.time_modulation(time), block.section_modulation(section)
    out = block((h, skip) if skip_channels else h, *modulations).tensor()
    torch.testing.assert_close(out, (y + shortcut) * 0.5)


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_a_convolution_of_a_pair_is_that_of_its_concatenation(layout: torch.memory_format, batch: int) -> None:
    conv = Conv1x1(11, 6).double().to(memory_format=layout)
    pair = [torch.randn(batch, channels, 4, 3).double().contiguous(memory_format=layout) for channels in (7, 4)]
    leaves = [each.requires_grad_() for each in (*pair, conv.weight, conv.bias)]
    y, expected = conv.of_pair(*pair), F.conv2d(torch.cat(pair, 1), conv.weight, conv.bias)
    torch.testing.assert_close(y, expected)
    assert not batch or y.is_contiguous(memory_format=layout)
    dy = torch.randn_like(expected)
    gradients = zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs)


def norm(module: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, module.num_groups, module.weight, module.bias, module.eps)


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[N, T, C] -> [N, heads, T, C / heads]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_attention_block_is_its_formula(layout: torch.memory_format) -> None:
    block = AttentionBlock(12, head_dim=4, num_groups=3, residual_scale=0.5).double().to(memory_format=layout)
    randomize(block)
    x = torch.randn(2, 12, 3, 5).double().contiguous(memory_format=layout)
    pixels = norm(block.norm, x).flatten(2).transpose(1, 2)
    q, k, v = (pixels @ block.qkv.weight.flatten(1).T + block.qkv.bias).chunk(3, 2)
    o = F.scaled_dot_product_attention(heads_first(q, 3), heads_first(k, 3), heads_first(v, 3))
    o = o.transpose(1, 2).flatten(2) @ block.proj.weight.flatten(1).T + block.proj.bias
    torch.testing.assert_close(block(x).tensor(), (x + o.transpose(1, 2).unflatten(2, (3, 5))) * 0.5)


def test_attention_reads_the_projection_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    block = AttentionBlock(12, head_dim=4, num_groups=3).to(memory_format=torch.channels_last)
    projected: list[Tensor] = []
    block.qkv.register_forward_hook(lambda _, args, output: projected.append(output))
    packed: list[Tensor] = []

    def attention(qkv: Tensor) -> Tensor:
        packed.append(qkv)
        return qkv[:, :, 0].contiguous()

    monkeypatch.setattr("soda_engine.models.blocks.attention_qkvpacked", attention)
    block(torch.randn(2, 12, 3, 5).contiguous(memory_format=torch.channels_last))
    assert packed[0].shape == (2, 15, 3, 3, 4) and packed[0].is_contiguous()
    assert packed[0].data_ptr() == projected[0].data_ptr()


def test_cross_attention_block_is_its_formula() -> None:
    block = CrossAttentionBlock(12, token_dim=7, head_dim=4, num_groups=3, residual_scale=0.5).double()
    randomize(block)
    x, tokens = torch.randn(2, 12, 3, 5).double(), torch.randn(2, 4, 7).double()
    q = norm(block.norm, x).flatten(2).transpose(1, 2) @ block.q.weight.flatten(1).T + block.q.bias
    k, v = (tokens @ block.kv.weight.T + block.kv.bias).chunk(2, 2)
    o = F.scaled_dot_product_attention(heads_first(q, 3), heads_first(k, 3), heads_first(v, 3))
    o = o.transpose(1, 2).flatten(2) @ block.proj.weight.flatten(1).T + block.proj.bias
    torch.testing.assert_close(block(x, tokens).tensor(), (x + o.transpose(1, 2).unflatten(2, (3, 5))) * 0.5)


def test_a_masked_section_leaves_its_embedding_as_token() -> None:
    tokens = SectionTokens([2, 3], 4)
    sections = [torch.randn(5, 2), torch.zeros(5, 3)]
    out = tokens(sections)
    assert out.shape == (5, 2, 4)
    assert torch.equal(out[:, 1], tokens.embedding[1].expand(5, 4))
    torch.testing.assert_close(out[:, 0], sections[0] @ tokens.proj[0].weight.T + tokens.embedding[0])


def test_dropout_depends_on_the_samples_key_alone() -> None:
    model = build(dropout=0.5).train()
    x_t, t, z = inputs(model, 3)
    seed = torch.tensor([3, -(2**63), 2**63 - 1])
    y = model(x_t, t, z, seed=seed)
    assert torch.equal(y, model(x_t, t, z, seed=seed))
    order = torch.tensor([2, 0])
    torch.testing.assert_close(model(x_t[order], t[order], z[order], seed=seed[order]), y[order])
    other = model(x_t, t, z, seed=torch.tensor([3, 4, 2**63 - 1]))
    torch.testing.assert_close(other[[0, 2]], y[[0, 2]])
    assert not torch.allclose(other[1], y[1])


def test_dropout_differs_from_block_to_block() -> None:
    model = build(dropout=0.5, multipliers=(1, 1), attention_resolutions=()).train()
    masks: dict[tuple[int, ...], list[Tensor]] = {}
    for layer in layers(model):
        layer.block.norm2.register_forward_hook(
            lambda _, args, output: masks.setdefault(tuple(output.shape), []).append(output == 0)
        )
    model(*inputs(model), seed=torch.tensor([1, 2]))
    assert [len(same) for same in masks.values()] == [4, 6]
    for same in masks.values():
        for index, mask in enumerate(same):
            assert 0.4 < mask.float().mean() < 0.6
            assert not any(torch.equal(mask, other) for other in same[:index])


def test_dropout_is_off_in_eval_mode_and_at_zero() -> None:
    model = build(dropout=0.5)
    batch = inputs(model)
    plain = model(*batch)
    assert torch.equal(model(*batch, seed=torch.tensor([1, 2])), plain)
    with pytest.raises(ValueError, match=r"seed is None; training with dropout needs one int64 key a sample"):
        model.train()(*batch)
    without = build(random=False, dropout=0.0).train()
    without.load_state_dict(model.state_dict())
    assert torch.equal(without(*batch), plain)


def test_every_parameter_is_trained() -> None:
    model = build(cross_attention=True, dropout=0.1).train()
    x_t, t, z = inputs(model)
    z.requires_grad_()
    model(x_t, t, z, seed=torch.tensor([1, 2])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert z.grad is not None and z.grad.all()


def test_autocast_runs_in_bf16() -> None:
    model = build(cross_attention=True)
    batch = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(*batch)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all() and y.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 9}, "image_size is 9; with 2 levels it must be divisible by 2"),
        ({"num_groups": 3}, r"num_groups is 3; it must divide the 8 channels \(channels 8 times multiplier 1\)"),
        ({"head_dim": 12}, "head_dim is 12; it must divide the 16 channels that attend"),
        ({"multipliers": ()}, r"multipliers is \(\); it must hold one positive number a level"),
        ({"blocks": 0}, "blocks is 0; it must be at least 1"),
        ({"dim": 2}, "latent dim is 2; it must be at least the number of sections, 3"),
        ({"pairing": "layer"}, "pairing is 'layer'; it must be"),
        (
            {"cross_attention": True, "attention_resolutions": (16,)},
            r"with cross_attention it must have one of \[8, 4\]",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (2, 3, 16, 16), r"x_t has shape \(2, 3, 16, 16\); it must be \(2, 3, 8, 8\)"),
        (1, (2, 1), r"t has shape \(2, 1\); it must be \(2,\)"),
        (2, (1, 16), r"z has shape \(1, 16\); it must be \(2, 16\)"),
    ],
    ids=["x_t", "t", "z"],
)
def test_wrong_inputs(index: int, shape: tuple[int, ...], message: str) -> None:
    model = build()
    batch = list(inputs(model))
    batch[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        model(*batch)
    with pytest.raises(ValueError, match=r"section_mask has shape \(2,\)"):
        model(*inputs(model), section_mask=torch.ones(2))


def test_a_condition_stands_for_time_and_z() -> None:
    model = build()
    x_t, t, z = inputs(model)
    condition = model.condition(z)(model.time_table(t)[1:])
    torch.testing.assert_close(model(x_t, condition=condition), model(x_t, t[1].expand(len(z)), z))
    for beside in ({"t": t}, {"z": z}, {"section_mask": torch.ones(3)}, {"seed": torch.tensor([1, 2])}):
        with pytest.raises(ValueError, match="condition came with t, z, section_mask or seed, which it stands for"):
            model(x_t, condition=condition, **beside)
    with pytest.raises(ValueError, match="condition is of 2 samples; x_t has 1"):
        model(x_t[:1], condition=condition)
    with pytest.raises(ValueError, match="z is None; give t and z, or a condition"):
        model(x_t, t)
    with pytest.raises(ValueError, match=r"z has shape \(2, 15\); it must be \(2, 16\)"):
        model.condition(z[:, 1:])
    with pytest.raises(ValueError, match=r"times has shape \(1, 2\); it must be \(2,\)"):
        model.time_table(t[None])
