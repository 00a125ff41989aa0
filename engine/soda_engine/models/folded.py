"""The encoder for evaluation: batch norms folded into the convolutions before them, and on a CPU all else with them.

With fixed statistics a batch norm is a factor and a shift a channel, which the convolution can apply itself:

    norm(conv(x)) = conv'(x)        w' = w * gamma / sqrt(var + eps)        b' = beta - mean * gamma / sqrt(var + eps)

On a CPU in fp32 the convolution then also adds the shortcut and takes the ReLU: `conv3x3` where it is of 3x3 filters
and stride 1, else oneDNN's, from weights that lie as it wants them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soda_engine.models.convolution import Conv3x3
from soda_engine.models.encoder import BasicBlock, Bottleneck, ResNetEncoder
from soda_kernels import conv3x3

Block = Callable[[Tensor], Tensor]


# Of each encoder on a CPU, the values it was folded from (as far as `_fingerprint` tells) and the function.
_LAST: WeakKeyDictionary[ResNetEncoder, tuple[tuple[Any, ...], Block]] = WeakKeyDictionary()


def folded(encoder: ResNetEncoder) -> Block:
    """Return a ResNet in evaluation mode as a function of images [N, C, H, W] to z, [N, d], for use without gradients.

    It keeps the weights and statistics of now. On a CPU the last one is kept, as much memory as the weights again, and
    returned until they change. Under autocast, on a GPU or in another dtype than fp32 it runs PyTorch's convolutions.
    """
    if next(encoder.parameters()).device.type != "cpu":  # whose values would have to be waited for
        return _fold(encoder)
    now, (before, encode) = _fingerprint(encoder), _LAST.get(encoder, ((), None))
    if encode is None or now != before:
        encode = _fold(encoder)
        _LAST[encoder] = now, encode
    return encode


@torch.no_grad()
def _fingerprint(encoder: ResNetEncoder) -> tuple[Any, ...]:
    """Return what changes with the encoder's values: where they lie, how often they were written, and their norms.

    What is written through `.data` is not counted as written, and moves the norms.
    """
    tensors = [*encoder.parameters(), *(each for each in encoder.buffers() if each.is_floating_point())]
    versions = [None if each.is_inference() else each._version for each in tensors]
    norms = torch.stack(torch._foreach_norm(tensors)).tolist()
    return (*(each.data_ptr() for each in tensors), *versions, *norms)


@torch.no_grad()
def _fold(encoder: ResNetEncoder) -> Block:
    """Fold what `folded` returns, which must not hold the encoder."""
    stem = _Convolution(encoder.conv1, encoder.bn1, relu=True)
    blocks = [
        _folded_block(block)
        for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
        for block in stage.children()
    ]

    pools, fc = encoder.config.stem == "imagenet", encoder.fc

    def encode(x: Tensor) -> Tensor:
        h = stem(x)
        if pools:
            h = F.max_pool2d(h, 3, stride=2, padding=1)
        for block in blocks:
            h = block(h)
        return fc(h.mean((2, 3)))

    return encode


def _folded_block(block: nn.Module) -> Block:
    """Fold a residual block: the last convolution of its branch adds the shortcut."""
    assert isinstance(block, BasicBlock | Bottleneck)
    shortcut = None if block.downsample is None else _Convolution(*block.downsample, relu=False)
    branch = [_Convolution(block.conv1, block.bn1, relu=True), _Convolution(block.conv2, block.bn2, relu=True)]
    if isinstance(block, Bottleneck):
        branch.append(_Convolution(block.conv3, block.bn3, relu=True))

    def run(x: Tensor) -> Tensor:
        h = x
        for convolution in branch[:-1]:
            h = convolution(h)
        return branch[-1](h, x if shortcut is None else shortcut(x))

    return run


class _Convolution:
    """relu(conv(x) + norm's shift + residual) with a folded norm; the residual is overwritten."""

    def __init__(self, conv: nn.Module, norm: nn.Module, *, relu: bool) -> None:
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        self.weight = (conv.weight * factor[:, None, None, None]).contiguous(memory_format=torch.channels_last)
        self.bias, self.relu = norm.bias - norm.running_mean * factor, relu
        self.stride, self.padding = list(conv.stride), [int(side) for side in conv.padding]
        self._is_3x3 = isinstance(conv, Conv3x3)
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._is_3x3:
            return conv3x3(x, self.weight, self.bias, residual=residual, activation="relu" if self.relu else None)
        if self._by_onednn(x):
            return self._fused(x, residual)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if self.relu else y

    def _by_onednn(self, x: Tensor) -> bool:
        return bool(
            x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32 and x.numel() > 0
            and torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()
            and not torch.is_autocast_enabled("cpu")
        )  # fmt: skip

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Run the ops that torch.compile runs on a CPU."""
        where: tuple[Any, ...] = (self.padding, self.stride, [1, 1], 1)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *where, list(x.shape))
        if residual is None:
            activation = "relu" if self.relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(x, self._packed, self.bias, *where, activation, [], "")
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, self._packed, self.bias, *where, "add", None, "relu", [], ""
        )
