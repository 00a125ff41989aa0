"""The wheel that a user installs: both packages whole, nothing else, the command, and the dependencies as declared."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

from tests.packaging.source_tree import ENGINE, KERNELS, PROJECT, ROOT, tracked_files

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel from a copy of the checkout, so that the build leaves nothing in it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in tracked_files():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    command = [sys.executable, "-c", BUILD, str(built)]
    # Without the native library, which test_native_build.py builds.
    environment = {**os.environ, "SODA_NATIVE": "0"}
    finished = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def read(wheel: zipfile.ZipFile, name: str) -> str:
    """Read a file of the wheel's own metadata folder."""
    (path,) = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return message_from_string(read(wheel, "METADATA"))


def test_wheel_holds_both_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    shipped = {path for path in wheel.namelist() if ".dist-info/" not in path}
    sources = {
        str(path.relative_to(package.parent))
        for package in (KERNELS, ENGINE)
        for path in tracked_files(".py", ".typed", ".json")
        if path.is_relative_to(package)
    }
    assert "soda_kernels/py.typed" in sources and "soda_engine/py.typed" in sources
    assert shipped == sources | {"soda_kernels/native_build.txt"}


def test_wheel_declares_the_command(wheel: zipfile.ZipFile) -> None:
    entries = configparser.ConfigParser()
    entries.read_string(read(wheel, "entry_points.txt"))
    assert dict(entries["console_scripts"]) == {"soda-engine": "soda_engine.cli:main"}


def test_base_install_is_torch_numpy_and_triton(metadata: Message) -> None:
    base = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert sorted(text.partition(">=")[0] for text in base) == ["numpy", "torch", "triton"]
    assert set(metadata.get_all("Provides-Extra", [])) == {"engine", "eval", "bench", "diffusers", "test", "all"}


def test_wheel_says_what_it_is(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("soda-engine", PROJECT["version"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in read(wheel, "licenses/LICENSE")


@pytest.mark.slow
def test_installed_wheel_imports_from_any_folder(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = "import soda_kernels; print(soda_kernels.__file__); [getattr(soda_kernels, n) for n in soda_kernels.__all__]"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert Path(finished.stdout.strip()).is_relative_to(tmp_path)
