"""The command line where it cannot go on: wrong input, packages that are not there, an interruption, a closed pipe."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from soda_engine.train.checkpoint import list_checkpoints
from tests.engine.calling import QUICK, Call

# wrong input

WRONG: dict[str, tuple[list[str], str]] = {
    "no-run": (["sample", "nowhere"], "no model at nowhere"),
    "no-model-on-the-hub": (["encode", "nobody/nothing"], "no model at nobody/nothing"),
    "folder-without-a-run": (["encode", "EMPTY"], "it holds neither checkpoints nor"),
    "damaged-run": (["encode", "DAMAGED"], "ema.safetensors is damaged"),
    "damaged-settings": (["encode", "MANGLED"], "config.json is damaged"),
    "no-info": (["info", "cifar11"], "no model at cifar11"),
    "broken-image": (["reconstruct", "RUN", "--images", "BROKEN"], "broken.png cannot be read as an image"),
    "no-image": (["reconstruct", "RUN", "--images", "no.png"], "no image at no.png"),
    "three-images-to-mix": (["mix", "RUN", "--indices", "1", "2", "3"], "3 images came; give an even number"),
    "one-image-to-interpolate": (["interpolate", "RUN", "--indices", "1"], "1 images came; give an even number"),
    "section": (["mix", "RUN", "--sections", "nose"], "section 'nose' does not exist; it must be one of ['level0'"),
    "unconditional-section": (["sample", "RUN", "--mode", "unguided", "--unconditional-sections", "x"], "section 'x'"),
    "device": (["encode", "RUN", "--device", "tpu9"], "device is 'tpu9'"),
    "data": (["encode", "RUN", "--data", "nowhere"], "nowhere"),
    "index": (["reconstruct", "RUN", "--indices", "540"], "indices has 540; the test set has images 0 to 539"),
    "negative-index": (["reconstruct", "RUN", "--indices", "-1"], "indices has -1"),
    "sample-num": (["sample", "RUN", "--num", "0"], "num is 0; it must be positive"),
    "reconstruct-num": (["reconstruct", "RUN", "--num", "-2"], "num is -2; it must be positive"),
    "num-steps": (["sample", "RUN", "--mode", "unguided", "--num-steps", "1001"], "num_steps is 1001"),
    "interpolate-steps": (["interpolate", "RUN", "--steps", "1"], "steps is 1; it must be at least 2"),
    "eta": (["sample", "RUN", "--mode", "unguided", "--eta", "-1"], "eta"),
    "num-directions": (["directions", "RUN", "--num-directions", "13"], "num_directions is 13"),
    "batch-size": (["encode", "RUN", "--batch-size", "0"], "batch_size is 0; it must be positive"),
    "k": (["probe", "RUN", "--k", "0", "--baselines"], "k is 0"),
    "out-is-a-file": (["sample", "RUN", "--out", "FILE"], "is a file; it must be a folder"),
    "out-in-a-file": (["sample", "RUN", "--mode", "unguided", "--num", "1", "--out", "FILE/x"], "FILE"),
    "train-batch": (["train", "digits", "--batch-size", "0"], "batch_size is 0"),
    "train-images": (["train", "digits", "--total-images", "0"], "total_images is 0; it must be positive"),
    "train-data": (["train", "cifar10", "--data", "nowhere"], "nowhere"),
    "train-groups": (["train", "digits", "--model.denoiser.num-groups", "7"], "num_groups is 7"),
    "train-channels": (["train", "digits", "--dataset.channels", "3"], "in_channels is 1 and dataset.channels 3"),
    "train-device": (["train", "digits", "--device", "tpu9"], "device is 'tpu9'"),
    "dry-run-groups": (["train", "digits", "--dry-run", "--model.denoiser.num-groups", "7"], "num_groups is 7"),
    "info-batch": (["info", "digits", "--batch-size", "0"], "batch_size is 0; it must be positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(call: Call, saved_run: Path, files: list[Path], tmp_path: Path, case: str) -> None:
    arguments, message = WRONG[case]
    places = {"RUN": saved_run, "BROKEN": files[4]}
    if case == "folder-without-a-run":
        places["EMPTY"] = files[0].parent
    if case in ("damaged-run", "damaged-settings"):
        places["DAMAGED"] = places["MANGLED"] = run = Path(shutil.copytree(saved_run, files[0].parent / "run"))
        weights, settings = list_checkpoints(run)[0] / "ema.safetensors", run / "config.json"
        damaged = weights if case == "damaged-run" else settings
        damaged.write_bytes(damaged.read_bytes()[:-100])
    (tmp_path / "FILE").write_text("kept")
    out = [] if "--out" in arguments or arguments[0] == "info" else ["--out", "out"]
    result = call(*(places.get(argument, argument) for argument in arguments), *out)
    assert result.code == 2
    # A bar that had begun to move is no message.
    lines = [line for line in re.split("[\r\n]", result.err) if line.strip() and not re.search(r"\d+%\|", line)]
    assert len(lines) == 1 and lines[0].startswith("soda-engine: ") and message in lines[0], result.err
    assert result.out == "" and [path.name for path in tmp_path.iterdir()] == ["FILE"]
    assert (tmp_path / "FILE").read_text() == "kept"


MISSPELT: dict[str, tuple[list[str], str]] = {
    "command": (["trian"], "train, sample"),
    "no-command": ([], "train, sample"),
    "preset": (["train", "cifar11"], "cifar10"),
    "no-run": (["encode"], "RUN"),
    "flag": (["encode", "RUN", "--fromat", "npz"], "--format"),
    "suffix": (["encode", "RUN", "--format", "csv"], "npz"),
    "split": (["encode", "RUN", "--splits", "tset"], "'test'"),
    "method": (["sample", "RUN", "--method", "euler"], "dpmpp_2m"),
    "not-a-number": (["sample", "RUN", "--num", "many"], "--num"),
}


@pytest.mark.parametrize("case", MISSPELT)
def test_what_the_parser_does_not_take(call: Call, saved_run: Path, tmp_path: Path, case: str) -> None:
    arguments, message = MISSPELT[case]
    result = call(*(saved_run if argument == "RUN" else argument for argument in arguments))
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err
    assert message in re.sub(r"[\s│]+", " ", result.err) and "--help" in result.err
    assert not list(tmp_path.iterdir())


def test_fresh_demo_deletes_runs_alone(call: Call, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    result = call("demo", "--out", "thesis", "--fresh")
    assert result.code == 2 and "thesis holds no run" in result.err
    assert (tmp_path / "thesis" / "thesis.tex").exists()


def test_interruption_is_one_line(call: Call, saved_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("soda_engine.evaluation.drawings.draw_mixes", interrupt)
    result = call("mix", saved_run, "--out", "out")
    assert (result.code, result.out, result.err) == (130, "", "soda-engine: interrupted\n")


# packages and pipes


def test_a_package_that_a_command_lacks(call: Call, saved_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchmetrics", "torchmetrics.functional.image"):
        monkeypatch.setitem(sys.modules, name, None)
    result = call("reconstruct", saved_run, "--num", "1", "--out", "out", *QUICK)
    assert result.code == 1
    assert result.err.splitlines()[-1] == "soda-engine needs torchmetrics: pip install 'soda-engine[engine]'"


@pytest.mark.parametrize("package", ["tyro", "kornia"])
def test_a_package_that_every_command_lacks(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from soda_engine.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"soda-engine needs {package}: pip install 'soda-engine[engine]'\n"


def test_slow_packages_wait_for_a_command_that_needs_them() -> None:
    slow = ("sklearn", "torchmetrics", "matplotlib.figure", "datasets", "tensorboard", "pandas")
    code = f"import sys, soda_engine.command_line; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_output_into_a_closed_pipe() -> None:
    command = [sys.executable, "-m", "soda_engine.cli", "train", "digits", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141
    process.stderr.close()
