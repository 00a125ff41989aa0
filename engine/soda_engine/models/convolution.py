"""The 3x3 convolution of stride 1, in which most of a training step's arithmetic lies."""

from __future__ import annotations

from torch import Tensor, nn

from soda_kernels import conv3x3


class Conv3x3(nn.Conv2d):
    """An `nn.Conv2d` of 3x3 filters, stride 1 and padding 1, which on a CPU takes this project's kernels."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H, W]."""
        return conv3x3(x, self.weight, self.bias)
