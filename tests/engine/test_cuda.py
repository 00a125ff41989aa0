"""On a GPU: the sampling loop as a graph, and neither it nor a training step waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from soda_engine.train.trainer import Trainer
from tests.engine.tiny import tiny_run
from tests.engine.tiny_soda import tiny_soda

pytestmark = pytest.mark.gpu


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("options", [{"method": "ddpm"}, {"eta": 0.5}, {"method": "dpmpp_2m"}], ids=str)
def test_a_graphed_loop_gives_what_the_eager_one_does(options: dict[str, Any], cfg_scale: float) -> None:
    model = tiny_soda().cuda()
    z = torch.randn(5, 13, device="cuda")
    sampling = {"num_steps": 7, "cfg_scale": cfg_scale, "batch_size": 3, **options}
    eager = model.sample(z, graphed=False, **sampling)
    torch.testing.assert_close(model.sample(z, **sampling), eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graphed", [False, True])
def test_sampling_does_not_wait(graphed: bool) -> None:
    model, z = tiny_soda().cuda(), torch.randn(2, 13, device="cuda")
    ids = torch.arange(2, device="cuda")
    model.sample(z, num_steps=4, sample_ids=ids, graphed=graphed)
    with no_waiting():
        model.sample(z, num_steps=4, sample_ids=ids, graphed=graphed)


def test_a_denoiser_that_cannot_be_captured_is_an_error() -> None:
    model, z = tiny_soda().cuda(), torch.randn(2, 13, device="cuda")
    denoise = model.denoise
    model.denoise = lambda x_t, *a, **k: denoise(x_t, *a, **k) * float(x_t.isfinite().all())  # type: ignore
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph"):
        model.sample(z, num_steps=4)
    assert model.sample(z, num_steps=4, graphed=False).isfinite().all()


def test_a_training_step_does_not_wait(tmp_path: Path) -> None:
    trainer = Trainer(tiny_run(tmp_path, device="cuda"))
    batches = trainer._batches()
    trainer.step(next(batches))
    batch = next(batches)
    with no_waiting():
        trainer.step(batch)
    assert trainer.read()["loss"] > 0
