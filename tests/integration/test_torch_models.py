"""Models of the guided-diffusion, EDM and DiffAE kinds with the kernels in them, against the same models without."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soda_kernels import ModulatedGroupNorm
from soda_kernels.integrations.replacement import Fused
from soda_kernels.integrations.torch import optimize, restore
from tests.integration.lookalikes import (
    EMB,
    LATENT,
    LOOKALIKES,
    AdmResBlock,
    Denoiser,
    DiffaeResBlock,
    LookalikeBlock,
    Swish,
)
from tests.integration.peers import FEW_CHANNELS, randomized
from tests.numerics import assert_accurate, assert_accurate_in_norm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

IMAGES = {"entry": FEW_CHANNELS, "out.2": FEW_CHANNELS}
"""What is left of every model: the convolutions from and to images."""


@functools.cache
def model_of(name: str) -> nn.Module:
    return randomized(LOOKALIKES[name][0]())


def arguments_of(name: str, dtype: torch.dtype, layout: Any = torch.contiguous_format, count: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(count, 3, 8, 8), (count, EMB)] + [(count, LATENT)] * (name == "DiffAE")
    made = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes]
    made[0] = made[0].to(memory_format=layout)
    return [each.requires_grad_() for each in made]


def step(model: nn.Module, name: str, dtype: torch.dtype, layout: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(dtype).to(memory_format=layout)
    arguments = arguments_of(name, dtype, layout)
    output = model(*arguments)
    output.square().sum().backward()
    results = {"output": output.detach()} | {f"input {i}": each.grad for i, each in enumerate(arguments)}
    return results | {name: parameter.grad for name, parameter in model.named_parameters()}


@functools.cache
def exact(name: str) -> dict[str, Tensor]:
    return step(model_of(name), name, torch.float64, torch.contiguous_format)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOOKALIKES)
def test_outputs_and_all_gradients(name: str, dtype: str, layout: str) -> None:
    model = copy.deepcopy(model_of(name))
    optimize(model)
    plain, ours = (step(each, name, DTYPES[dtype], LAYOUTS[layout]) for each in (model_of(name), model))
    for part, result in ours.items():
        judge = assert_accurate if part == "output" else assert_accurate_in_norm
        judge(result, plain[part], exact(name)[part], part)


@pytest.mark.parametrize("name", LOOKALIKES)
def test_report_state_and_restoration(name: str) -> None:
    model = copy.deepcopy(model_of(name))
    shown, state = repr(model), {key: value.data_ptr() for key, value in model.state_dict().items()}
    report = optimize(model)
    assert report.left == IMAGES
    blocks = [names for label, names in report.replaced.items() if label.startswith("residual block")]
    assert sum(map(len, blocks)) == LOOKALIKES[name][1]
    assert "out" in report.replaced["sequence with group norm and SiLU"]
    assert optimize(model) == report
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == state
    restore(model)
    assert repr(model) == shown and not any(isinstance(module, Fused) for module in model.modules())


@pytest.mark.parametrize("name", LOOKALIKES)
def test_pickled_and_copied(name: str) -> None:
    model = copy.deepcopy(model_of(name))
    optimize(model)
    arguments = arguments_of(name, torch.float32)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(*arguments), model(*arguments))
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]


def test_block_with_the_attributes_and_another_formula_is_left() -> None:
    model = randomized(Denoiser(LookalikeBlock(8, 16, EMB, scale_shift=True, updown=False)))
    arguments = arguments_of("", torch.float32)
    plain = model(*arguments)
    report = optimize(model)
    assert report.left == IMAGES | {"blocks.0": "it computes something else than blocks with its attributes do"}
    torch.testing.assert_close(model(*arguments), plain, rtol=1e-4, atol=1e-4)


def test_block_that_concatenates_its_skip() -> None:
    model = randomized(DiffaeResBlock(8, 16, EMB, LATENT, lateral=True))
    arguments = [torch.randn(2, 4, 8, 8), torch.randn(2, EMB), None, torch.randn(2, 4, 8, 8)]
    plain = model(*arguments)
    assert optimize(model).replaced["residual block of the DiffAE kind"] == ["the model itself"]
    torch.testing.assert_close(model(*arguments), plain)
    with pytest.raises(ValueError, match="lateral is None"):
        model(*arguments[:3])


def test_checkpointed_block_draws_the_same_dropout() -> None:
    model = randomized(Denoiser(AdmResBlock(8, 16, EMB, scale_shift=True, updown=False, dropout=0.4)))
    optimize(model)
    gradients = []
    for use_checkpoint in (False, True):
        model.blocks[0].use_checkpoint = use_checkpoint
        torch.manual_seed(0)
        model.zero_grad()
        model(*arguments_of("", torch.float32)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    evaluated = model.eval()(*arguments_of("", torch.float32))
    assert torch.equal(evaluated, model(*arguments_of("", torch.float32)))


@pytest.mark.parametrize("name", ["guided-diffusion", "EDM, adaptive"])
@pytest.mark.slow
def test_compiled_without_graph_breaks(name: str) -> None:
    model = copy.deepcopy(model_of(name))
    optimize(model)
    arguments = arguments_of(name, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), model(*arguments))


class TestSequences:
    @pytest.mark.parametrize("silu", [nn.SiLU, Swish])
    def test_calls_are_fused_and_parts_are_plain(self, silu: Any) -> None:
        model = nn.Sequential(nn.GroupNorm(2, 4), silu(), nn.Dropout(0.3), nn.Conv2d(4, 4, 1)).eval()
        x = torch.randn(2, 4, 5, 5)
        plain, norm, both = model(x), model[0](x), model[:2](x)
        optimize(model)
        for now, before in ((model(x), plain), (model[0](x), norm), (model[:2](x), both)):
            torch.testing.assert_close(now, before)
        assert type(model[:2]) is type(model)
        dropped = model.train()[:3](x) == 0
        assert 0.15 < dropped.float().mean() < 0.45

    def test_a_hook_sees_what_it_saw(self) -> None:
        model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
        optimize(model)
        x, seen = torch.randn(2, 4, 5, 5), []
        model[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        result = model(x)
        torch.testing.assert_close(seen[0], nn.functional.group_norm(x, 2))
        torch.testing.assert_close(result, nn.functional.silu(seen[0]))

    def test_silu_that_is_none_is_not_taken(self) -> None:
        class SiLU(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * (2 * x).sigmoid()

        model = nn.Sequential(nn.GroupNorm(2, 4), SiLU())
        x = torch.randn(2, 4, 5, 5)
        plain = model(x)
        assert list(optimize(model).replaced) == ["group norm"]
        torch.testing.assert_close(model(x), plain)


def test_norm_that_only_looks_like_one_is_left() -> None:
    class Scaled(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(2, 4), nn.SiLU(), nn.GroupNorm(2, 4))
    assert optimize(model).replaced == {"group norm": ["2"]}


def test_model_on_meta() -> None:
    with torch.device("meta"):
        model = LOOKALIKES["guided-diffusion"][0]()
    report = optimize(model)
    assert len(report.replaced["residual block of the guided-diffusion kind"]) == 2 and report.left == IMAGES
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (nn.Linear(2, 2), ValueError, "Linear has no group norm and no 3x3 convolution that could be replaced"),
        ("model", TypeError, "model is a str; it must be an nn.Module"),
        (nn.Linear, TypeError, "model is a type; it must be an nn.Module"),
    ],
    ids=["no group norm", "str", "class"],
)
def test_what_is_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        optimize(value)
    assert str(caught.value) == message


def test_modulated_group_norm_loads_a_group_norms_state() -> None:
    plain = randomized(nn.GroupNorm(4, 16, eps=1e-3))
    ours = ModulatedGroupNorm(4, 16, eps=1e-3, activation=None)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(ours(x), plain(x))
    nn.GroupNorm(4, 16).load_state_dict(ours.state_dict())


def test_what_was_parametrized_since_is_not_restored_and_stays_whole() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU())
    x = torch.randn(2, 16, 8, 8)
    optimize(model)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    expected = model(x)
    with pytest.raises(ValueError, match="a Conv2d was parametrized after optimize; remove its parametrizations"):
        restore(model)
    assert torch.equal(model(x), expected)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    restore(model)
    assert type(model[0]) is nn.Conv2d
