"""The ResNet that distils a source view into z, with the tensor names of torchvision and timm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soda_engine.config import EncoderConfig
from soda_engine.models.convolution import Conv3x3


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: the residual block of ResNet-18."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _projection(in_channels, channels * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, channels, H / stride, W / stride]."""
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = self.bn2(self.conv2(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut: the residual block of ResNet-50.

    The stride sits on the 3x3 convolution, as in every published set of weights.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, 4 * channels, H / stride, W / stride]."""
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = F.relu(self.bn2(self.conv2(h)), inplace=True)
        h = self.bn3(self.conv3(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)), inplace=True)


_ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class ResNetEncoder(nn.Module):
    """Encode a source view: z = fc(mean over space of ResNet(x)), deterministic and not normalized.

    Convolutions start from He's normal distribution over the fan-out, and every batch norm, also the last of a residual
    branch, from weight 1 and bias 0, as in torchvision; `fc` starts as `nn.Linear` does.

    Args:
        config: depth, width and stem. `image_size` is not used here: any size runs.
        latent_dim: length of z.

    Raises:
        ValueError: `config.arch` or `config.stem` is unknown, or a size is not positive.

    Reference:
        He et al. 2016 (ResNet); He et al. 2015, equation 14 (initialization).
    """

    def __init__(self, config: EncoderConfig, latent_dim: int) -> None:
        super().__init__()
        if config.arch not in _ARCHITECTURES:
            raise ValueError(f"arch is {config.arch!r}; it must be one of {list(_ARCHITECTURES)}")
        if config.stem not in ("small", "imagenet"):
            raise ValueError(f"stem is {config.stem!r}; it must be 'small' or 'imagenet'")
        for name, size in (("width", config.width), ("in_channels", config.in_channels), ("latent_dim", latent_dim)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        block, depths = _ARCHITECTURES[config.arch]
        self.config = config
        self.latent_dim = latent_dim
        if config.stem == "small":
            self.conv1 = _conv3x3(config.in_channels, config.width, 1)
        else:
            self.conv1 = nn.Conv2d(config.in_channels, config.width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        channels = config.width
        stages: list[nn.Sequential] = []
        for index, depth in enumerate(depths):
            width = config.width * 2**index
            blocks: list[nn.Module] = []
            for position in range(depth):
                blocks.append(block(channels, width, 2 if index > 0 and position == 0 else 1))
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(channels, latent_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Encode images.

        Args:
            x: [N, C, H, W], the source view.

        Returns:
            z, [N, latent_dim].

        Raises:
            ValueError: x is not a batch of images of `config.in_channels` channels.
        """
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (N, {self.config.in_channels}, H, W)")
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.config.stem == "imagenet":
            h = F.max_pool2d(h, 3, stride=2, padding=1)
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(h.mean((2, 3)))


def load_resnet_weights(encoder: ResNetEncoder, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Load a ResNet's weights as torchvision and timm publish them, in place.

    A projection of another size (`fc`) and a stem of another kernel or number of input channels (`conv1`, and `bn1`,
    whose statistics are those of that convolution's output) play another role and are left as they are.

    Args:
        encoder: receives the weights.
        state_dict: name -> tensor.

    Returns:
        The names of the encoder's tensors that were left as they are, in the encoder's order.

    Raises:
        ValueError: the weights are those of another depth or width; the message names the first tensor that differs.
    """
    own = encoder.state_dict()
    where = f"{encoder.config.arch} of width {encoder.config.width}"
    # Old checkpoints do not count batches; a count only matters to a cumulative average, which is not used.
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    skipped: set[str] = set()
    for anchor, prefixes in (("conv1.weight", ("conv1.", "bn1.")), ("fc.weight", ("fc.",))):
        if anchor not in state_dict or state_dict[anchor].shape != own[anchor].shape:
            skipped.update(name for name in own if name.startswith(prefixes))
    for name, tensor in state_dict.items():
        if name not in own:
            raise ValueError(f"state_dict has {name}, which {where} does not have; give weights of that architecture")
        if name not in skipped and tensor.shape != own[name].shape:
            came, accepted = tuple(tensor.shape), tuple(own[name].shape)
            raise ValueError(f"state_dict has {name} of shape {came}; in {where} it must be {accepted}")
    missing = [name for name in own if name not in state_dict and name not in skipped | counters]
    if missing:
        raise ValueError(f"state_dict lacks {missing[0]}, which {where} has; give weights of that architecture")
    with torch.no_grad():
        for name in own:
            if name not in skipped and name in state_dict:
                own[name].copy_(state_dict[name])
    return [name for name in own if name in skipped]


def _conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    if stride == 1:
        return Conv3x3(in_channels, out_channels, bias=False)
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class _Conv1x1(nn.Conv2d):
    """A 1x1 convolution that on a CPU takes its strided pixels itself.

    The backward of oneDNN's strided one corrupts memory on a processor with AVX2 and no AVX-512, in channels_last on
    one thread (PyTorch 2.13.0): the process dies some allocations later.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.stride == (1, 1):
            return super().forward(x)
        return F.conv2d(x[..., :: self.stride[0], :: self.stride[1]], self.weight, self.bias)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return the shortcut's 1x1 convolution and norm, or None where the shortcut is the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        _Conv1x1(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )
