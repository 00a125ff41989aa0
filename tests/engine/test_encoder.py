"""The encoder: tensor names of published weights, sizes, initialization, and loading weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from soda_engine.config import EncoderConfig
from soda_engine.models.encoder import ResNetEncoder, load_resnet_weights

PUBLISHED_PARAMETERS = {"resnet18": 11_689_512, "resnet50": 25_557_032}
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
ARCHS = list(DEPTHS)


def published(arch: str, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """List the tensors of a published ImageNet ResNet: name -> shape."""
    table: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        table.update({f"{name}.{tensor}": (channels,) for tensor in ("weight", "bias", "running_mean", "running_var")})
        table[f"{name}.num_batches_tracked"] = ()

    def conv(name: str, norm_name: str, channels: int, out: int, kernel: int) -> None:
        table[f"{name}.weight"] = (out, channels, kernel, kernel)
        norm(norm_name, out)

    conv("conv1", "bn1", 3, 64, 7)
    channels = 64
    for layer, (depth, width) in enumerate(zip(DEPTHS[arch], (64, 128, 256, 512), strict=True), 1):
        # (kernel, channels out) of each convolution of a block
        shapes = [(3, width), (3, width)] if arch == "resnet18" else [(1, width), (3, width), (1, 4 * width)]
        for index in range(depth):
            block, into = f"layer{layer}.{index}", channels
            for number, (kernel, out) in enumerate(shapes, 1):
                conv(f"{block}.conv{number}", f"{block}.bn{number}", into, out, kernel)
                into = out
            if index == 0 and (layer > 1 or channels != into):
                conv(f"{block}.downsample.0", f"{block}.downsample.1", channels, into, 1)
            channels = into
    table["fc.weight"], table["fc.bias"] = (num_classes, channels), (num_classes,)
    return table


def weights(table: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.tensor(7) if not shape else torch.randn(shape, generator=generator) for name, shape in table.items()
    }


def encoder(arch: str, latent_dim: int = 1000, stem: str = "imagenet", **options: int) -> ResNetEncoder:
    return ResNetEncoder(EncoderConfig(arch=arch, stem=stem, **options), latent_dim)


@pytest.mark.parametrize("arch", ARCHS)
def test_names_and_shapes_are_the_published_ones(arch: str) -> None:
    with torch.device("meta"):
        model = encoder(arch)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == published(arch)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[arch]


@pytest.mark.parametrize(
    ("arch", "stem", "side", "sides"),
    [
        ("resnet18", "small", 32, [32, 32, 16, 8, 4]),
        ("resnet18", "imagenet", 64, [32, 16, 8, 4, 2]),
        ("resnet50", "small", 9, [9, 9, 5, 3, 2]),
    ],
)
def test_sides_of_the_feature_maps(arch: str, stem: str, side: int, sides: list[int]) -> None:
    model = encoder(arch, 10, stem, width=8).eval()
    seen: list[int] = []
    for module in (model.conv1, model.layer1, model.layer2, model.layer3, model.layer4):
        module.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[-1]))
    assert model(torch.randn(2, 3, side, side)).shape == (2, 10)
    assert seen == sides


def test_bottleneck_strides_on_its_3x3_convolution() -> None:
    block = encoder("resnet50", width=8).layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))


@pytest.mark.parametrize("in_channels", [1, 9])
def test_input_channels(in_channels: int) -> None:
    model = encoder("resnet18", 16, "small", in_channels=in_channels, width=8)
    assert model(torch.randn(2, in_channels, 8, 8)).shape == (2, 16)
    with pytest.raises(ValueError, match=rf"x has shape \(2, 3, 8, 8\); it must be \(N, {in_channels}, H, W\)"):
        model(torch.randn(2, 3, 8, 8))


def test_initialization_is_he_over_fan_out_with_every_norm_the_identity() -> None:
    torch.manual_seed(0)
    model = encoder("resnet18")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        elif isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            # The smallest weight has 8192 values, so the standard error of its deviation is 1 / sqrt(2 * 8192) = 0.8%.
            assert module.weight.std().item() * fan_out**0.5 == pytest.approx(2**0.5, rel=0.05)


def test_residual_sum_and_mean_over_space() -> None:
    # With every branch's last norm at zero weight, resnet18's first stage is the identity on the stem's output.
    model = encoder("resnet18", 4, "small", width=4).eval()
    for block in model.layer1:
        torch.nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 3, 8, 8)
    stem = torch.relu(model.bn1(model.conv1(x)))
    assert torch.equal(model.layer1(stem), stem)
    features = model.layer4(model.layer3(model.layer2(stem)))
    expected = torch.nn.functional.adaptive_avg_pool2d(features, 1).flatten(1) @ model.fc.weight.T + model.fc.bias
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("arch", ARCHS)
def test_published_weights_load_whole(arch: str) -> None:
    model, state = encoder(arch), weights(published(arch))
    assert load_resnet_weights(model, state) == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_another_role_is_skipped_and_named() -> None:
    model = encoder("resnet18", 128, "small")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = weights(published("resnet18"))
    skipped = load_resnet_weights(model, state)
    stem = ["conv1.weight", *(f"bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var"))]
    assert skipped == [*stem, "bn1.num_batches_tracked", "fc.weight", "fc.bias"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in skipped else state[name]), name


def test_weights_without_projection_or_counters_load() -> None:
    model = encoder("resnet18", 1000)
    state = weights(published("resnet18"))
    state = {k: v for k, v in state.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
    assert load_resnet_weights(model, state) == ["fc.weight", "fc.bias"]
    assert torch.equal(model.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


@pytest.mark.parametrize(
    ("arch", "width", "source", "message"),
    [
        ("resnet18", 64, "resnet50", r"layer1\.0\.conv1\.weight of shape \(64, 64, 1, 1\).*resnet18 of width 64"),
        ("resnet50", 64, "resnet18", r"layer1\.0\.conv1\.weight of shape \(64, 64, 3, 3\).*resnet50 of width 64"),
        ("resnet18", 32, "resnet18", r"layer1\.0\.conv1\.weight of shape \(64, 64, 3, 3\).*resnet18 of width 32"),
    ],
)
def test_another_architecture_is_refused_and_nothing_is_written(
    arch: str, width: int, source: str, message: str
) -> None:
    model = encoder(arch, width=width)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_resnet_weights(model, weights(published(source)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unknown_and_missing_tensors_are_named() -> None:
    model, state = encoder("resnet18"), weights(published("resnet18"))
    with pytest.raises(ValueError, match="has layer1.2.conv1.weight, which resnet18 of width 64 does not have"):
        load_resnet_weights(model, {**state, "layer1.2.conv1.weight": torch.zeros(64, 64, 3, 3)})
    del state["layer3.1.bn2.bias"]
    with pytest.raises(ValueError, match="lacks layer3.1.bn2.bias"):
        load_resnet_weights(model, state)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("arch", "resnet34", "arch is 'resnet34'; it must be one of"),
        ("stem", "patch", "stem is 'patch'; it must be"),
        ("width", 0, "width is 0; it must be at least 1"),
    ],
)
def test_wrong_settings(field: str, value: object, message: str) -> None:
    config = dataclasses.replace(EncoderConfig(), **{field: value})
    with pytest.raises(ValueError, match=message):
        ResNetEncoder(config, 8)
