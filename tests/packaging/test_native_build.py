"""Building the native CPU library: it is there wherever it can be, and its absence fails nothing and is explained."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from soda_kernels import _native
from tests.packaging.source_tree import ROOT, tracked_files

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
COMPILERS = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Copy the checkout, so that a build leaves nothing in it."""
    for path in tracked_files():
        copy = tmp_path / "source" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return tmp_path / "source"


def run(source: Path, code: str, *arguments: str, path: str | None = None, native: str = "") -> tuple[int, str]:
    """Call the build's entry points with a PATH and a SODA_NATIVE; return the exit status and what was said."""
    path = os.environ["PATH"] if path is None else path
    environment = {**os.environ, "SODA_NATIVE": native, "PATH": path, "CXXFLAGS": "-Werror"}
    environment.pop("CXX", None)
    command = [sys.executable, "-c", code, *arguments]
    finished = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    return finished.returncode, finished.stdout + finished.stderr


def built_wheel(folder: Path) -> zipfile.ZipFile:
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.skipif(not COMPILERS, reason="there is no C++ compiler")
@pytest.mark.skipif(os.environ.get("SODA_NATIVE") == "0", reason="the library was left out by SODA_NATIVE=0")
def test_the_library_is_built_where_there_is_a_compiler() -> None:
    """What makes the skips of the native kernels' tests impossible on a machine that has a compiler."""
    _native.load()
    assert _native.native_status().available, f"{_native.native_status()}; pip install -e . builds it"


@pytest.mark.parametrize(
    ("path", "native", "reason"),
    [("", "", "there was no C++ compiler when the package was installed"),
     (None, "0", "it was left out by SODA_NATIVE=0")],
    ids=["no-compiler", "SODA_NATIVE=0"],
)
def test_a_wheel_without_the_library_says_why(source: Path, path: str | None, native: str, reason: str) -> None:
    status, output = run(source, BUILD, str(source.parent), path=path, native=native)
    assert status == 0, output
    assert f"soda-engine: native CPU library left out: {reason}" in output
    wheel = built_wheel(source.parent)
    assert wheel.read("soda_kernels/native_build.txt").decode().strip() == reason
    assert "soda_kernels/libsoda_kernels.so" not in wheel.namelist()


@pytest.mark.parametrize(
    ("path", "native", "message"),
    [("", "1", "SODA_NATIVE=1, and the native CPU library cannot be built: there was no C++ compiler"),
     (None, "2", "SODA_NATIVE is '2'; it must be 0, 1 or unset")],
    ids=["required", "unknown"],
)  # fmt: skip
def test_what_cannot_be_met_fails_the_build(source: Path, path: str | None, native: str, message: str) -> None:
    status, output = run(source, BUILD, str(source.parent), path=path, native=native)
    assert status != 0
    assert message in output


@pytest.mark.slow
@pytest.mark.skipif(not COMPILERS or not shutil.which("cmake"), reason="there is no C++ compiler, or no CMake")
def test_a_built_wheel_runs_from_any_folder_with_any_python(source: Path) -> None:
    """The compiler's warnings are errors here."""
    status, output = run(source, BUILD, str(source.parent), native="1")
    assert status == 0, output
    wheel = built_wheel(source.parent)
    assert wheel.filename is not None and "-py3-none-linux_" in wheel.filename
    assert "soda_kernels/native_build.txt" not in wheel.namelist()
    site = source.parent / "site"
    wheel.extractall(site)
    code = "from soda_kernels import _native; _native.load(); print(_native.LIBRARY, _native.native_status().available)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=source.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.stdout.strip() == f"{site / 'soda_kernels' / 'libsoda_kernels.so'} True", finished.stderr
