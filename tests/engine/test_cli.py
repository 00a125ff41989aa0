"""The command line: what each command writes, and what its help explains."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import soda_engine
from soda_engine import PRESETS, TrainConfig
from soda_engine.command_line import COMMANDS_BY_NAME
from soda_engine.config import from_dict, to_dict
from soda_engine.data.datasets import open_dataset
from soda_engine.evaluation.features import load_features
from soda_engine.models.soda import load_weights
from soda_engine.models.unet import Denoiser
from soda_engine.train.checkpoint import list_checkpoints
from tests.engine.calling import QUICK, Call

SIDE = 64  # in a picture


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
