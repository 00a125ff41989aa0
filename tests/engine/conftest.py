"""The command line to call, and the run and the images that its commands are given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from soda_engine import Soda
from soda_engine.cli import main
from soda_engine.config import to_dict
from soda_engine.train.checkpoint import Progress, save_checkpoint
from soda_engine.train.optim import build_optimizer
from tests.engine.calling import Call, Result
from tests.engine.tiny import tiny_run


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Result:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # by the parser: --help, or arguments that it does not take
            code = int(leaving.code or 0)
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on the digits, as the trainer leaves it, although nothing was trained."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    config = tiny_run(run)
    torch.manual_seed(0)
    model, average = Soda(config.model), Soda(config.model)
    with torch.no_grad():
        for parameter in average.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(run, model, average, build_optimizer(model, config.optim), Progress(images=96, step=6), keep=1)
    (run / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
    return run


@pytest.fixture
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four image files of different sizes, modes and formats, and in the end a file that is none."""
    folder, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / name for name in ("a.png", "b.jpg", "c.png", "d.bmp", "broken.png")]
    for path, size in zip(paths[:4], [(9, 9, 3), (33, 47, 3), (20, 8), (8, 8)], strict=True):
        Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)).save(path)
    paths[4].write_bytes(b"no image")
    return paths
