"""The command line: what each command writes, what it says of wrong input, and what its help explains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import soda_engine
from soda_engine import PRESETS, Soda, TrainConfig
from soda_engine.cli import main
from soda_engine.command_line import COMMANDS_BY_NAME
from soda_engine.config import from_dict, to_dict
from soda_engine.data.datasets import open_dataset
from soda_engine.evaluation.features import load_features
from soda_engine.models.soda import load_weights
from soda_engine.models.unet import Denoiser
from soda_engine.train.checkpoint import Progress, list_checkpoints, save_checkpoint
from soda_engine.train.optim import build_optimizer
from tests.engine.tiny import tiny_run

QUICK = ["--num-steps", "2"]
SIDE = 64  # in a picture


class Result(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Result]


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


def rows_and_columns(path: Path) -> tuple[int, int]:
    """How many pictures of 64 px fit into a PNG beside its labels."""
    width, height = Image.open(path).size
    return height // SIDE, width // SIDE


# help


def option_texts(help_text: str) -> dict[str, str]:
    """Map each flag in a help text to what is said about it, without defaults."""
    lines = [line.strip("│ ").rstrip() for line in help_text.splitlines() if line.startswith("│")]
    texts: dict[str, str] = {}
    flag = None
    for line in lines:
        if re.match(r"-{1,2}[a-z]", line) or re.fullmatch(r"[A-Z]+(  .*)?", line):
            spelling, _, said = line.partition("  ")
            flag = spelling.split(",")[0].split(" ")[0]
            texts[flag] = said.strip()
        elif re.match(r"[•─(]", line):
            flag = None
        elif flag is not None:
            texts[flag] += " " + line
    return {flag: re.sub(r"\((default: .*|required)\)", "", text).strip() for flag, text in texts.items()}


@pytest.mark.parametrize("command", [name for name in COMMANDS_BY_NAME if name != "train"])
def test_help_explains_every_flag(call: Call, command: str) -> None:
    result = call(command, "--help")
    assert result.code == 0 and result.err == ""
    texts = option_texts(result.out)
    assert len(texts) > 3 and "--device" in texts
    assert [flag for flag, text in texts.items() if len(text.split()) < 2] == []
    assert not re.search(r"^│ STR\b", result.out, re.MULTILINE) and "None}" not in result.out


def test_help_of_a_preset_explains_every_setting(call: Call) -> None:
    result = call("train", "cifar10", "--help")
    texts = option_texts(result.out)

    def names(values: dict[str, Any], prefix: str = "") -> list[str]:
        nested = [names(v, f"{prefix}{k}.") if isinstance(v, dict) else [f"{prefix}{k}"] for k, v in values.items()]
        return [name for group in nested for name in group]

    flags = {f"--{name}".replace("_", "-") for name in names(to_dict(PRESETS["cifar10"]))}
    assert result.code == 0 and texts.keys() == flags | {"-h"}
    assert [flag for flag, text in texts.items() if len(text.split()) < 2] == []
    assert re.search(r"--batch-size INT\W+Images a step, over all processes. \(default: 256\)", result.out)


def test_help_lists_commands_and_presets(call: Call) -> None:
    commands, presets = call("--help"), call("train", "--help")
    assert commands.code == presets.code == 0
    assert all(re.search(rf"• {name} +\w\w+ \w+", commands.out) for name in COMMANDS_BY_NAME)
    assert all(re.search(rf"• {name} +\S+: resnet", presets.out) for name in PRESETS)


# what the commands write


@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        ([], (3, 3)),  # new images, in a square
        (["--mode", "unguided"], (3, 3)),
        (["--mode", "variations", "--indices", "0", "5"], (10, 2)),  # the image and nine variations of each
    ],
    ids=["gaussian", "unguided", "variations"],
)
def test_sample(call: Call, saved_run: Path, tmp_path: Path, mode: list[str], shape: tuple[int, int]) -> None:
    result = call("sample", saved_run, *mode, "--num", "9", "--out", "out", *QUICK)
    assert result.code == 0, result.err
    assert result.out == "out/samples.png\n" and [path.name for path in (tmp_path / "out").iterdir()] == ["samples.png"]
    rows, columns = rows_and_columns(tmp_path / "out" / "samples.png")
    assert rows in (shape[0], shape[0] + 1) and columns in range(shape[1], shape[1] + 3)  # labels take some room


def test_a_denoiser_is_compiled_where_that_is_asked_for(
    call: Call, saved_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr(Denoiser, "compile", lambda _denoiser, **options: compiled.append(options))
    for flags in ([], ["--compile", "default"]):
        assert call("sample", saved_run, "--mode", "unguided", "--num", "1", "--out", "out", *QUICK, *flags).code == 0
    assert compiled == [{"fullgraph": True, "mode": None}]


def test_a_compiler_that_fails_is_said_in_one_line(
    call: Call, saved_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CompilerFailed(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fail(_denoiser: Denoiser, **_options: Any) -> None:
        raise CompilerFailed("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(Denoiser, "compile", fail)
    result = call("sample", saved_run, "--mode", "unguided", "--num", "1", "--compile", "default", *QUICK)
    line = "soda-engine: torch.compile failed: No working C++ compiler found; leave out --compile\n"
    assert (result.code, result.err) == (1, line)


def test_samples_depend_on_the_seed_alone(call: Call, saved_run: Path, tmp_path: Path) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call("sample", saved_run, "--num", "4", "--seed", seed, "--out", out, *QUICK).code == 0
    a, b, c = ((tmp_path / out / "samples.png").read_bytes() for out in "abc")
    assert a == b != c


def test_results_go_into_the_run_unless_told(call: Call, saved_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(saved_run, tmp_path / "run"))
    result = call("sample", "run", "--mode", "unguided", "--num", "1", *QUICK)
    assert result.code == 0 and result.out == "run/samples.png\n" and (run / "samples.png").is_file()


def test_reconstruct_test_images(call: Call, saved_run: Path, tmp_path: Path) -> None:
    result = call("reconstruct", saved_run, "--num", "3", "--out", "out", *QUICK)
    assert result.code == 0, result.err
    scores = json.loads((tmp_path / "out" / "reconstructions.json").read_text())
    assert scores.keys() >= {"psnr", "ssim", "images"} and scores["images"] == 3 and scores["psnr"] > 0
    assert result.out.splitlines() == [
        f"PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f} over 3 images", "out/reconstructions.png"
    ]  # fmt: skip
    assert (tmp_path / "out" / "reconstructions.png").is_file()


def test_reconstruct_image_files(call: Call, saved_run: Path, files: list[Path], tmp_path: Path) -> None:
    result = call("reconstruct", saved_run, "--images", *files[:4], "--out", "out", *QUICK)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "out" / "reconstructions.json").read_text())["images"] == 4


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("order", ["run-first", "run-last"])
def test_encode(call: Call, saved_run: Path, tmp_path: Path, suffix: str, order: str) -> None:
    flags = ["--out", "out", "--format", suffix, "--batch-size", "300"]
    result = call("encode", *([saved_run, *flags] if order == "run-first" else [*flags, saved_run]))
    assert result.code == 0, result.err
    assert result.out.splitlines() == [f"out/train.{suffix}: z (1257, 12)", f"out/test.{suffix}: z (540, 12)"]
    features = load_features(tmp_path / "out" / f"test.{suffix}")
    assert features.z.shape == (540, 12) and features.labels is not None and set(features.labels) == set(range(10))


def test_encode_gives_z_of_the_average(call: Call, saved_run: Path, tmp_path: Path, files: list[Path]) -> None:
    folder = tmp_path / "images"
    for split in ("train", "test"):
        for name, file in (("x", files[0]), ("y", files[1])):
            (folder / split / name).mkdir(parents=True)
            shutil.copy(file, folder / split / name)
    result = call("encode", saved_run, "--data", folder, "--out", "out", "--splits", "test")
    assert result.code == 0, result.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test.npz"]
    config = from_dict(TrainConfig, json.loads((saved_run / "config.json").read_text()))
    images = open_dataset(str(folder), config.dataset, "test").read([0, 1])[0]
    model = load_weights(list_checkpoints(saved_run)[0] / "ema.safetensors")
    np.testing.assert_allclose(load_features(tmp_path / "out" / "test.npz").z, model.encode(images), rtol=1e-5)


def test_probe_beside_baselines(call: Call, saved_run: Path, tmp_path: Path) -> None:
    result = call("probe", saved_run, "--out", "out", "--k", "5")
    assert result.code == 0, result.err
    results = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert results.keys() >= {"linear_probe", "linear_sweep", "knn", "chosen"}
    for probe in ("linear_probe", "linear_sweep", "knn"):
        assert results[probe].keys() == {"z", "untrained", "pixels"}
        assert results[probe]["pixels"] > 0.9  # digits are easy
        assert 0.1 < results[probe]["z"] < 1
    assert "k = 5" in result.out and f"{100 * results['knn']['pixels']:.1f}" in result.out


def test_probe_without_baselines(call: Call, saved_run: Path, tmp_path: Path) -> None:
    assert call("probe", saved_run, "--out", "out", "--baselines").code == 0
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["knn"].keys() == {"z"}


@pytest.mark.parametrize("flags", [[], ["--spherical"]], ids=["linear", "spherical"])
def test_interpolate(call: Call, saved_run: Path, tmp_path: Path, files: list[Path], flags: list[str]) -> None:
    result = call("interpolate", saved_run, "--images", *files[:4], "--steps", "5", "--out", "out", *flags, *QUICK)
    assert result.code == 0 and result.out == "out/interpolation.png\n", result.err
    rows, columns = rows_and_columns(tmp_path / "out" / "interpolation.png")
    assert rows in (2, 3) and columns in (7, 8)  # two pairs: image, five steps, image


@pytest.mark.parametrize(
    ("sections", "rows"), [([], 7), (["--sections", "middle", "level0"], 5)], ids=["each", "two-together"]
)
def test_mix(call: Call, saved_run: Path, tmp_path: Path, sections: list[str], rows: int) -> None:
    result = call("mix", "--indices", *range(8), "--out", "out", *sections, *QUICK, saved_run)
    assert result.code == 0 and result.out == "out/mix.png\n", result.err
    assert rows_and_columns(tmp_path / "out" / "mix.png")[0] in (rows, rows + 1)


def test_directions(call: Call, saved_run: Path, tmp_path: Path) -> None:
    flags = ["--num-directions", "4", "--amounts", "-2", "0", "2.5", "--out", "out"]
    result = call("directions", saved_run, *flags, *QUICK)
    assert result.code == 0 and result.out == "out/directions.png\n", result.err
    assert rows_and_columns(tmp_path / "out" / "directions.png")[0] in (4, 5)


def test_guidance_flags_reach_the_sampler(call: Call, saved_run: Path, tmp_path: Path) -> None:
    base = ["reconstruct", saved_run, "--num", "2", "--num-steps", "3", "--out"]
    variants: dict[str, list[str]] = {
        "plain": [], "guided": ["--cfg-scale", "3"],
        "by-section": ["--cfg-scale", "3", "--unconditional-sections", "middle"],
        "eta": ["--eta", "1"], "ddpm": ["--method", "ddpm"], "dpmpp": ["--method", "dpmpp_2m"], "seed": ["--seed", "1"],
        "steps": ["--num-steps", "5"],
    }  # fmt: skip
    for name, flags in variants.items():
        assert call(*base, name, *flags).code == 0
    pictures = {(tmp_path / name / "reconstructions.png").read_bytes() for name in variants}
    # DDIM with eta 1 and DDPM are the same sampler.
    assert len(pictures) == len(variants) - 1


def test_info_of_a_run_and_of_a_preset(call: Call, saved_run: Path) -> None:
    of_run, of_preset = call("info", saved_run, "--device", "cpu"), call("info", "digits", "--device", "cpu")
    assert of_run.code == of_preset.code == 0
    assert "z: 12 numbers in 3 sections" in of_run.out and "z: 64 numbers in 3 sections" in of_preset.out


def test_info_writes_what_it_prints(call: Call, tmp_path: Path) -> None:
    result = call("info", "digits", "--device", "cpu", "--out", "out/there")
    assert result.code == 0 and (tmp_path / "out" / "there" / "info.txt").read_text() == result.out


def test_dry_run_writes_nothing(call: Call, tmp_path: Path) -> None:
    result = call("train", "digits", "--dry-run", "--out", "out", "--model.latent.dim", "48", "--device", "cpu")
    assert result.code == 0 and not list(tmp_path.iterdir())
    settings = result.out.partition("\n\n")[0]
    config = from_dict(TrainConfig, json.loads(settings))
    assert config.out == "out" and config.model.latent.dim == 48 and config.batch_size == PRESETS["digits"].batch_size
    assert "z: 48 numbers" in result.out


def test_saved_models_need_data_to_be_named(call: Call, saved_run: Path, tmp_path: Path) -> None:
    soda_engine.load(saved_run).save_pretrained(tmp_path / "model")
    result = call("reconstruct", "model", "--out", "out", *QUICK)
    assert result.code == 2 and result.err == "soda-engine: model does not say what it was trained on; give --data\n"
    assert call("reconstruct", "model", "--data", "digits", "--num", "2", "--out", "out", *QUICK).code == 0
    assert (tmp_path / "out" / "reconstructions.png").is_file()


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
