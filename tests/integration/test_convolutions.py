"""3x3 convolutions that `optimize` replaces: which ones, what they compute, and where they are PyTorch's."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from soda_kernels import conv3x3, native_status
from soda_kernels.integrations import diffusers as in_diffusers
from soda_kernels.integrations.convolutions import Conv3x3
from soda_kernels.integrations.replacement import OWN_FORWARD, Fused
from soda_kernels.integrations.torch import optimize, restore
from tests.integration.peers import FEW_CHANNELS, PEERS, inputs_of

# Not in silence where it could be built: tests/packaging/test_native_build.py fails there.
native = pytest.mark.skipif(not native_status().available, reason=str(native_status()))


class Calls(TorchDispatchMode):
    """Counts the ops that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def image(*shape: int) -> Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)


def replaced(convolution: nn.Conv2d) -> nn.Conv2d:
    model = nn.Sequential(copy.deepcopy(convolution))
    optimize(model)
    assert isinstance(model[0], Conv3x3)
    return model[0]


class Scaled(nn.Conv2d):
    """A convolution of a class of its own."""


class Adapter(nn.Module):
    """The structure of peft's LoRA layer for a convolution, which is no subclass of one."""

    def __init__(self, base_layer: nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Conv2d(base_layer.in_channels, rank, 3, padding=1, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(rank, base_layer.out_channels, 1, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def with_own_forward() -> nn.Module:
    module = nn.Conv2d(8, 8, 3, padding=1)
    module.forward = module.forward
    return module


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))


LEFT: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "three channels": (lambda: nn.Conv2d(3, 8, 3, padding=1), {"1": FEW_CHANNELS}),
    "four filters": (lambda: nn.Conv2d(8, 4, 3, padding=1), {"1": FEW_CHANNELS}),
    "own class": (lambda: Scaled(8, 8, 3, padding=1), {"1": "it is a Scaled"}),
    "parametrized": (parametrized, {"1": "it is a ParametrizedConv2d"}),
    "own forward": (with_own_forward, {"1": OWN_FORWARD}),
    "adapter": (lambda: Adapter(nn.Conv2d(8, 8, 3, padding=1), 8), {
        "1.base_layer": "an adapter such as LoRA wraps it", "1.lora_A.default": "an adapter such as LoRA wraps it"}),
    "1x1": (lambda: nn.Conv2d(8, 8, 1), {}),
    "stride": (lambda: nn.Conv2d(8, 8, 3, padding=1, stride=2), {}),
    "padding": (lambda: nn.Conv2d(8, 8, 3), {}),
    "dilation": (lambda: nn.Conv2d(8, 8, 3, padding=1, dilation=2), {}),
    "groups": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2), {}),
    "reflection": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), {}),
    "3d": (lambda: nn.Conv3d(8, 8, 3, padding=1), {}),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3, padding=1), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name: str) -> None:
    make, reasons = LEFT[name]
    model = nn.Sequential(nn.GroupNorm(2, 8), make())
    classes = [type(module) for module in model[1].modules()]
    report = optimize(model)
    assert report.left.keys() == reasons.keys()
    assert all(report.left[each].startswith(reason) for each, reason in reasons.items())
    assert [type(module) for module in model[1].modules()] == classes


@native
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_in_channels_last_it_is_winograds(bias: bool, padding: Any) -> None:
    plain = nn.Conv2d(8, 16, 3, padding=padding, bias=bias)
    ours, x = replaced(plain), image(2, 8, 6, 6).requires_grad_()
    with Calls() as calls:
        y = ours(x)
        y.square().sum().backward()
    assert calls.counts["conv3x3"] == calls.counts["conv3x3_backward"] == 1
    assert not calls.counts["convolution"]
    assert torch.equal(y, conv3x3(x, plain.weight, plain.bias))
    expected = plain(x)
    torch.testing.assert_close(y, expected)
    (dweight,) = torch.autograd.grad(expected.square().sum(), plain.weight)
    torch.testing.assert_close(ours.weight.grad, dweight)
    assert ours.weight.grad.stride() == ours.weight.stride()


ELSEWHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "bf16": Tensor.bfloat16,
    "fp64": Tensor.double,
    "no batch": lambda x: x[0],
    "empty batch": lambda x: x[:0],
    "four tiles": lambda x: x[:1, :, :4, :4],
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_elsewhere_it_is_what_it_was(name: str) -> None:
    x = ELSEWHERE[name](image(2, 8, 6, 6))
    plain = nn.Conv2d(8, 16, 3, padding=1).to(x.device, x.dtype)
    ours = replaced(plain)
    with Calls() as calls:
        y = ours(x)
    expected = plain(x)
    assert calls.counts["convolution"] == 1 and not calls.counts["conv3x3"]
    assert y.shape == expected.shape and y.stride() == expected.stride()
    assert y.is_meta or torch.equal(y, expected)


def test_under_autocast_it_is_what_it_was() -> None:
    plain, x = nn.Conv2d(8, 16, 3, padding=1), image(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(replaced(plain)(x), plain(x))


@native
@pytest.mark.parametrize("name", PEERS)
def test_a_whole_model_stays_in_channels_last(name: str) -> None:
    model = PEERS[name]().to(memory_format=torch.channels_last)
    report = in_diffusers.optimize(model)
    arguments = {key: value.float() if value.is_floating_point() else value for key, value in inputs_of(model).items()}
    arguments["sample"] = arguments["sample"].to(memory_format=torch.channels_last)
    with Calls() as calls:
        model(**arguments).sample.sum().backward()
    assert calls.counts["conv3x3"] == calls.counts["conv3x3_backward"] == len(report.replaced[Conv3x3.label])


def test_models_without_a_group_norm() -> None:
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    assert optimize(plain).replaced == {Conv3x3.label: ["0"]}
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                           num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    report = in_diffusers.optimize(tiny)
    assert list(report.replaced) == [Conv3x3.label] and set(report.left.values()) == {FEW_CHANNELS}
    assert in_diffusers.optimize(tiny) == report
    in_diffusers.restore(tiny)
    assert not any(isinstance(module, Fused) for module in tiny.modules())


def test_a_copy_an_adapter_and_a_restoration() -> None:
    plain = nn.Conv2d(8, 16, 3, padding=1)
    ours, x = replaced(plain), image(2, 8, 6, 6)
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(other) is type(ours) and torch.equal(other(x), ours(x))
    # One that wraps it afterwards finds a convolution.
    adapter = Adapter(ours, 8)
    assert isinstance(adapter.base_layer, nn.Conv2d) and adapter(x).shape == (2, 16, 6, 6)
    restore(adapter)
    assert type(ours) is nn.Conv2d and torch.equal(ours(x), plain(x))


def test_hooks_run_and_wrong_channels_are_refused() -> None:
    ours, seen = replaced(nn.Conv2d(8, 16, 3, padding=1)), []
    ours.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    assert ours(image(2, 8, 6, 6)) is seen[0]
    for x in (image(2, 16, 6, 6), torch.randn(2, 16, 6, 6)):
        with pytest.raises((ValueError, RuntimeError)):
            ours(x)


@native
@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_compiled_it_is_the_same_one(layout: torch.memory_format) -> None:
    ours, x = replaced(nn.Conv2d(8, 16, 3, padding=1)), image(2, 8, 6, 6).contiguous(memory_format=layout)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # with gradients, and then without
        with Calls() as calls:
            y = ours(x)
        name = "conv3x3" if layout == torch.channels_last else "convolution"
        assert calls.counts[name] == 1 and torch.equal(compiled(x), y)
        ours.requires_grad_(False)


def graphed_calls(module: nn.Module, x: Tensor) -> list[tuple[Any, ...]]:
    """Return the functions that Dynamo's graph of a call has, with the arguments that are no tensors."""
    calls: list[tuple[Any, ...]] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.op == "call_function" and node.target is not getattr:  # asked for a device: nothing runs
                calls.append((node.target, *(each for each in node.args if not isinstance(each, torch.fx.Node))))
        return graph

    torch.compile(module, fullgraph=True, backend=backend)(x)
    return calls


def test_on_another_device_it_compiles_to_what_it_did() -> None:
    plain, x = nn.Conv2d(8, 16, 3, padding=1, device="meta"), image(2, 8, 6, 6).to("meta")
    calls = graphed_calls(replaced(plain), x)
    assert calls == graphed_calls(plain, x) and [function for function, *_ in calls] == [torch.conv2d]
