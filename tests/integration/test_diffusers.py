"""Models of diffusers with the kernels in them, against the same models without."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.unets.unet_2d_blocks import KCrossAttnDownBlock2D
from torch import Tensor, nn

from soda_kernels.integrations.convolutions import Conv3x3
from soda_kernels.integrations.diffusers import attention, optimize, restore
from soda_kernels.integrations.replacement import Fused
from tests.integration.peers import (
    FEW_CHANNELS,
    PEERS,
    Steps,
    assert_same_training,
    conditional_unet,
    inputs_of,
    randomized,
    steps,
    unet,
)
from tests.numerics import assert_exact

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@functools.cache
def peer(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomized(PEERS[name]())


@functools.cache
def exact(name: str) -> Steps:
    return steps(peer(name))


def optimized(model: nn.Module) -> Any:
    replaced = copy.deepcopy(model)
    optimize(replaced)
    return replaced


def arguments_of(model: nn.Module) -> dict[str, Tensor]:
    given = inputs_of(model).items()
    return {name: value.float() if value.is_floating_point() else value for name, value in given}


def output(model: nn.Module, **changes: Any) -> Tensor:
    return model(**arguments_of(model) | changes).sample.detach()


def is_3x3(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (1, 1)


def replaced_in(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Fused)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PEERS)
def test_outputs_and_all_gradients(name: str, dtype: str, layout: str) -> None:
    plain, ours = (
        steps(model, DTYPES[dtype], LAYOUTS[layout]) for model in (peer(name), optimized(peer(name)))
    )  # fmt: skip
    assert_same_training(ours, plain, exact(name))


@pytest.mark.parametrize("name", PEERS)
def test_every_norm_attention_and_convolution_is_replaced(name: str) -> None:
    model = copy.deepcopy(peer(name))
    norms = [each for each, module in model.named_modules() if isinstance(module, nn.GroupNorm)]
    convolutions = {each for each, module in model.named_modules() if is_3x3(module)}
    attentions = [each for each, module in model.named_modules() if type(module).__name__ == "Attention"]
    report = optimize(model)
    # Images have three channels and latents four.
    assert {each.rpartition(".")[2] for each in report.left} == {"conv_in", "conv_out"}
    assert set(report.left.values()) == {FEW_CHANNELS}
    assert set(report.replaced[Conv3x3.label]) == convolutions - set(report.left)
    assert {*norms, *attentions} <= set(replaced_in(model))
    assert sorted(replaced_in(model)) == sorted(sum(report.replaced.values(), []))
    assert f"{len(attentions)} attention: {attentions[0]}" in str(report)


@pytest.mark.parametrize("name", PEERS)
def test_a_second_call_changes_nothing_and_restore_undoes(name: str) -> None:
    model = copy.deepcopy(peer(name)).eval()
    before, shown, tree = output(model), repr(model), dict(model.named_modules())
    attributes = {name: set(vars(module)) for name, module in tree.items()}
    processors = dict(model.attn_processors) if hasattr(model, "attn_processors") else {}
    first, classes = optimize(model), [type(module) for module in model.modules()]
    assert optimize(model) == first
    assert [type(module) for module in model.modules()] == classes
    assert all(module is tree[name] for name, module in model.named_modules())
    restore(model)
    assert repr(model) == shown and not replaced_in(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(output(model), before)
    assert processors == (dict(model.attn_processors) if processors else {})


@pytest.mark.parametrize("name", PEERS)
def test_state_dict_is_the_same(name: str) -> None:
    model = copy.deepcopy(peer(name))
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    optimize(model)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("name", PEERS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = optimized(peer(name).eval())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(peer(name)) and not replaced_in(loaded)
    assert torch.equal(output(loaded), output(peer(name)))
    # Weights that come after the kernels do.
    fresh = type(model).from_config(model.config).eval()
    optimize(fresh)
    fresh.load_state_dict(loaded.state_dict())
    assert torch.equal(output(fresh), output(model))


def test_pickled_and_copied() -> None:
    model = optimized(peer("unet").eval())
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert replaced_in(other) == replaced_in(model)
        assert torch.equal(output(other), output(model))
        restore(other)
        assert torch.equal(output(other), output(peer("unet")))


@pytest.mark.parametrize("name", ["conditional unet", "autoencoder"])
@pytest.mark.parametrize("order", ["fused, then optimized", "optimized, then fused"])
def test_fused_projections(name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []

    def counted(qkv: Tensor) -> Tensor:
        calls.append(qkv.shape)
        return attention_qkvpacked(qkv)

    attention_qkvpacked = attention.attention_qkvpacked
    monkeypatch.setattr(attention, "attention_qkvpacked", counted)
    plain = copy.deepcopy(peer(name)).eval()
    model: Any = copy.deepcopy(plain)
    stages = [optimize, lambda each: each.fuse_qkv_projections()]
    for stage in stages if order.startswith("optimized") else reversed(stages):
        stage(model)
    result, num_self = output(model), sum("attn2" not in each for each in replaced_attention(model))
    assert [shape[2] for shape in calls] == [3] * num_self
    torch.testing.assert_close(result, output(plain), rtol=1e-4, atol=1e-4)
    model.unfuse_qkv_projections()
    assert type(next(iter(model.attn_processors.values()))).__name__ == "AttnProcessor2_0"
    assert torch.equal(output(model), output(optimized(plain)))
    assert len(calls) == num_self


def replaced_attention(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, attention.Attention)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet scale_shift, resampled in blocks", "conditional unet"])
def test_compiled_without_graph_breaks(name: str) -> None:
    model = optimized(peer(name).eval())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output_of(compiled, model), output(model))


def output_of(compiled: Any, model: nn.Module) -> Tensor:
    return compiled(**arguments_of(model), return_dict=False)[0].detach()


@pytest.mark.slow
def test_optimized_after_it_was_compiled() -> None:
    model = copy.deepcopy(peer("unet")).eval()
    compiled = torch.compile(model, backend="aot_eager")
    plain = output_of(compiled, model)
    optimize(compiled)
    ours = output_of(compiled, model)
    assert torch.equal(ours, output(model)) and not torch.equal(ours, plain)
    restore(compiled)
    assert torch.equal(output_of(compiled, model), plain)


def test_mask_runs_the_processor_that_was_set() -> None:
    plain = peer("conditional unet").eval()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    masked = output(plain, encoder_attention_mask=mask)
    assert not torch.allclose(masked, output(plain), atol=1e-3)
    ours = output(optimized(plain), encoder_attention_mask=mask)
    torch.testing.assert_close(ours, masked, rtol=1e-4, atol=1e-4)


def test_processor_set_by_hand() -> None:
    plain = copy.deepcopy(peer("conditional unet")).eval()
    model: Any = copy.deepcopy(plain)
    model.set_attn_processor(attention.SodaAttnProcessor())
    torch.testing.assert_close(output(model), output(plain), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="there is an attention mask"):
        output(model, encoder_attention_mask=torch.ones(2, 5))


def test_dropout_is_of_its_probability_and_none_in_evaluation() -> None:
    model: Any = optimized(unet(dropout=0.25))
    block = model.mid_block.resnets[0]
    seen: list[Tensor] = []
    handle = block.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    output(model.train())
    output(model.eval())
    output(model)
    handle.remove()
    shares = [float((hidden == 0).float().mean()) for hidden in seen]
    assert 0.2 < shares[0] < 0.3 and shares[1] == 0
    kept = seen[0] != 0
    assert kept.float().mean(dim=(0, 2, 3)).std() > 0  # the mask is no channel's
    assert torch.equal(seen[1], seen[2])


def test_checkpoint_draws_the_same_dropout() -> None:
    model: Any = optimized(randomized(unet(dropout=0.3)))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        torch.manual_seed(4)
        model.zero_grad()
        model(inputs_of(model)["sample"].float(), 3).sample.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_model_on_meta() -> None:
    with torch.device("meta"):
        model = conditional_unet()
    report = optimize(model)
    assert report == optimize(copy.deepcopy(peer("conditional unet")))
    arguments = {name: value.to("meta", torch.float32) for name, value in inputs_of(model).items()}
    assert model(**arguments).sample.shape == (2, 4, 16, 16)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: unet(act_fn="mish"), "its activation is Mish"),
        (lambda: conditional_unet(encoder_hid_dim=24, encoder_hid_dim_type="text_proj",
                                  addition_embed_type=None, mid_block_type="UNetMidBlock2DSimpleCrossAttn"),
         "it has added keys and values"),
        (lambda: with_processor(conditional_unet()), "its processor is AttnProcessor"),
        (lambda: hooked(unet()), "its forward was set on the instance"),
    ],
    ids=["activation", "added keys", "processor", "instance"],
)  # fmt: skip
def test_what_is_left_has_a_reason(make: Any, reason: str) -> None:
    model = make().eval()
    plain = output(model)
    report = optimize(model)
    assert any(each.startswith(reason) for each in report.left.values()), report
    assert reason in str(report)
    assert not set(report.left) & set(replaced_in(model))
    torch.testing.assert_close(output(model), plain, rtol=1e-4, atol=1e-4)


def with_processor(model: Any) -> Any:
    model.set_default_attn_processor()
    return model


def hooked(model: Any) -> Any:
    """Set the forward of a norm and of a block on their instances, as accelerate does."""
    for module in (model.down_blocks[0].resnets[0].norm1, model.mid_block.resnets[0], model.conv_norm_out):
        module.forward = module.forward
    return model


@pytest.mark.parametrize("activation", ["swish", "gelu"])
def test_adaptive_group_norms(activation: str) -> None:
    # Blocks of K-diffusion's upscaler. With swish, which it has not, the SiLU after the norms is fused too.
    block: Any = KCrossAttnDownBlock2D(
        in_channels=32, out_channels=64, temb_channels=12, cross_attention_dim=24, num_layers=2, attention_head_dim=8,
        add_self_attention=True, resnet_act_fn=activation,
    )  # fmt: skip
    block = randomized(block).double()
    image, emb, text = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 32, 8, 8), (2, 12), (2, 5, 24)))

    def gradients() -> list[Tensor]:
        block.zero_grad()
        hidden, _ = block(image, emb, text)
        hidden.square().sum().backward()
        return [hidden.detach(), *(parameter.grad for parameter in block.parameters())]

    plain = gradients()
    report = optimize(nn.ModuleDict({"model": unet(), "block": block}))
    assert "block.attentions.0.norm1" in report.replaced["adaptive group norm"]
    assert ("block.resnets.0" in report.replaced["residual block"]) == (activation == "swish")
    assert ("block.resnets.0" in report.left) == (activation == "gelu")
    for ours, theirs in zip(gradients(), plain, strict=True):
        assert_exact(ours, theirs)


def test_models_are_their_classes_still() -> None:
    assert isinstance(optimized(unet()), UNet2DModel)
    assert type(optimized(conditional_unet())) is UNet2DConditionModel
