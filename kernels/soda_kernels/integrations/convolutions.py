"""3x3 convolutions that take Winograd's kernels where those run, and are PyTorch's everywhere else."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from soda_kernels.convolution.api import conv3x3
from soda_kernels.convolution.ops import runs_winograd, unsupported_channels
from soda_kernels.integrations.replacement import OWN_FORWARD, Fused, own_forward, replace


class Conv3x3(Fused):
    """A 3x3 convolution: on a CPU in fp32 and channels_last by Winograd's filtering, else as it was."""

    label = "3x3 convolution (faster on a CPU in fp32 and channels_last)"
    weight: Tensor
    bias: Tensor | None

    def fused_forward(self, x: Tensor) -> Tensor:
        # Inside of torch.compile too, whose convolutions on a CPU are oneDNN's; a graph for a GPU has PyTorch's alone.
        if x.is_cpu and x.ndim == 4 and runs_winograd(x, self.weight, self.bias):
            return conv3x3(x, self.weight, self.bias)
        y: Tensor = self.plain_class.forward(self, x)
        return y


def replace_convolutions(model: nn.Module) -> dict[str, str]:
    """Replace the convolutions that Winograd's kernels can compute, and return why others were left, by name."""
    left = {}
    for name, module, adapted in _candidates(model):
        reason = "an adapter such as LoRA wraps it" if adapted else _why_left(module)
        if reason is None:
            replace(module, Conv3x3)
        else:
            left[name] = reason
    return left


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d, bool]]:
    """Yield convolutions of the right geometry that are not replaced yet, and whether they are an adapter's parts."""
    parts = dict(model.named_modules())
    # peft's layers keep what they wrap in `base_layer`, beside convolutions of their own.
    adapters = [f"{name}.".lstrip(".") for name, part in parts.items() if hasattr(part, "base_layer")]
    for name, part in parts.items():
        if isinstance(part, nn.Conv2d) and not isinstance(part, Fused) and _is_3x3(part):
            yield name, part, any(name.startswith(adapter) for adapter in adapters)


def _is_3x3(module: nn.Conv2d) -> bool:
    return (
        module.kernel_size == (3, 3) and module.stride == module.dilation == (1, 1) and module.groups == 1
        and module.padding in ((1, 1), "same") and module.padding_mode == "zeros"
    )  # fmt: skip


def _why_left(module: nn.Conv2d) -> str | None:
    if type(module) is not nn.Conv2d:
        return f"it is a {type(module).__name__}, which may compute something else than a convolution"
    if own_forward(module):
        return OWN_FORWARD
    return unsupported_channels(module.in_channels, module.out_channels)
