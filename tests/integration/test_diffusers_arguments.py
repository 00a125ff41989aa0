"""What `optimize` of diffusers' models takes, and the one line with which it refuses the rest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, UNet2DModel, VQModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from soda_kernels.integrations.diffusers import agreement, optimize, restore
from soda_kernels.integrations.replacement import Fused
from tests.integration.peers import unet


def one_line(error: BaseException) -> str:
    (line,) = str(error).splitlines()
    return line


def transformer() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=3, num_layers=1, norm_num_groups=1, sample_size=8
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "model is a int, neither a model of diffusers nor a pipeline; give it the model"),
        ("runwayml/stable-diffusion-v1-5", "model is a str, neither"),
        (UNet2DModel, "model is a type, neither"),
        (nn.GroupNorm(2, 4), "soda_kernels.integrations.torch.optimize takes any other module"),
    ],
    ids=["int", "str", "class", "torch module"],
)
def test_what_is_no_model(value: Any, message: str) -> None:
    for function in (optimize, restore):
        with pytest.raises(TypeError) as caught:
            function(value)
        assert message in one_line(caught.value)


def test_model_without_group_norm() -> None:
    with pytest.raises(ValueError) as caught:
        optimize(transformer())
    assert one_line(caught.value).startswith("DiTTransformer2DModel has no group norm")


def test_old_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "__version__", "0.9.1")
    with pytest.raises(ValueError) as caught:
        optimize(unet())
    assert one_line(caught.value).startswith("diffusers is 0.9.1; ")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Have the agreement found out again, before and after a test."""
    agreement._disagreeing.cache_clear()
    yield
    agreement._disagreeing.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_version_that_computes_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ResnetBlock2D.forward
    monkeypatch.setattr(ResnetBlock2D, "forward", lambda self, x, temb, *rest: plain(self, x, temb, *rest) * 1.01)
    model = unet()
    with pytest.raises(ValueError) as caught:
        optimize(model)
    assert "computes UNet2DModel, UNet2DConditionModel, AutoencoderKL otherwise" in one_line(caught.value)
    assert not any(isinstance(module, Fused) for module in model.modules())


@pytest.mark.usefixtures("forgotten")
def test_finding_out_leaves_no_trace() -> None:
    model, state = unet(), torch.get_rng_state()
    with torch.device("meta"), torch.no_grad():
        optimize(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_model_of_a_pipeline() -> None:
    pipeline = DDPMPipeline(unet=unet(), scheduler=DDPMScheduler())
    report = optimize(pipeline)
    assert report.model == "DDPMPipeline"
    assert "unet.mid_block.resnets.0" in report.replaced["residual block"]
    assert any(isinstance(module, Fused) for module in pipeline.unet.modules())
    pipeline.set_progress_bar_config(disable=True)
    assert (
        len(pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images) == 1
    )
    restore(pipeline)
    assert not any(isinstance(module, Fused) for module in pipeline.unet.modules())


def test_spatial_norms_are_left() -> None:
    model = VQModel(block_out_channels=(32,), norm_type="spatial", vq_embed_dim=3, num_vq_embeddings=4).eval()
    sample = torch.randn(1, 3, 8, 8)
    plain = model(sample).sample
    report = optimize(model)
    assert report.left["decoder.conv_norm_out"] == "its scale and shift are images"
    assert report.left["decoder.mid_block.resnets.0"] == "its norm is a SpatialNorm"
    assert "encoder.mid_block.resnets.0" in report.replaced["residual block"]
    torch.testing.assert_close(model(sample).sample, plain, rtol=1e-4, atol=1e-4)


def test_module_around_a_model() -> None:
    wrapped = nn.ModuleDict({"inner": unet(), "other": AutoencoderKL(norm_num_groups=4, block_out_channels=(8,))})
    report = optimize(wrapped)
    assert {name.partition(".")[0] for name in report.replaced["residual block"]} == {"inner", "other"}


def test_diffusers_is_imported_on_use() -> None:
    code = (
        "import sys, torch, soda_kernels.integrations.diffusers as d, soda_kernels.integrations.torch as t\n"
        "assert 'diffusers' not in sys.modules\n"
        "t.optimize(torch.nn.GroupNorm(2, 4))\n"
        "assert 'diffusers' not in sys.modules\n"
        "sys.modules['diffusers'] = None\n"
        "try:\n    d.optimize(3)\nexcept ImportError as error:\n    print(error)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("diffusers cannot be imported (") and "pip install diffusers" in finished.stdout
