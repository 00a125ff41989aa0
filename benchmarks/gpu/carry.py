"""Gather what a GPU machine without network lacks into one folder beside the checkout: `make carry`.

    python -m benchmarks.gpu.carry [--data DIR] [--python 3.12]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.checkout import CARRIED, COMMIT, ROOT, sources_digest
from benchmarks.commands.arguments import Parser
from benchmarks.gpu.preflight import LIBRARY
from soda_engine.environment import environment

PACKAGES = (
    "tyro", "docstring-parser", "typeguard", "kornia", "kornia-rs", "datasets", "dill", "multiprocess", "xxhash",
)  # fmt: skip
"""What soda_engine imports and machines with PyTorch often lack; their other needs come with PyTorch and pandas."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST_MIB = 40.0
"""Of packages: a tree that is sent to a machine with each command should stay small."""


def main(arguments: list[str] | None = None) -> int:
    """Fill the folder anew and say what it holds; 1 where packages cannot be had, 2 for wrong input."""
    parser = Parser(prog="python -m benchmarks.gpu.carry", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", type=Path, metavar="DIR",
                        help="CIFAR-10 as parquet files, to be carried too; left out if not given")  # fmt: skip
    parser.add_argument("--python", default="3.12", metavar="VERSION",
                        help="of the other machine; %(default)s if not given")  # fmt: skip
    options = parser.parse_args(arguments)
    files = sorted(options.data.glob("*.parquet")) if options.data else []
    if options.data and not files:
        print(f"carry: --data is {options.data}, which holds no parquet file", file=sys.stderr)
        return 2
    shutil.rmtree(CARRIED, ignore_errors=True)
    CARRIED.mkdir()
    code = install(CARRIED / "packages", options.python)
    if code:
        print("carry: pip could not bring the packages", file=sys.stderr)
        return 1
    if (ROOT / LIBRARY).exists():
        shutil.copyfile(ROOT / LIBRARY, CARRIED / LIBRARY.name)
    else:
        print("no native CPU library to carry: it is built there if there is a compiler")
    if files:
        (CARRIED / "cifar10").mkdir()
        for path in files:
            shutil.copyfile(path, CARRIED / "cifar10" / path.name)
    COMMIT.write_text(f"{environment(torch.device('cpu'))['git']} {sources_digest()}\n")
    for path in sorted(CARRIED.iterdir()):
        print(f"{size_mib(path):6.1f} MiB  {path.relative_to(ROOT)}")
    print(f"{size_mib(CARRIED):6.1f} MiB  in all")
    packages = size_mib(CARRIED / "packages")
    if packages > MOST_MIB:
        print(f"carry: the packages take {packages:.1f} MiB, more than {MOST_MIB:.0f}", file=sys.stderr)
        return 1
    return 0


def install(folder: Path, python: str) -> int:
    """Have pip put the packages there, in the versions of this environment where it has them."""
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", python, "--target", str(folder),
        *(f"--platform={platform}" for platform in PLATFORMS), *map(_requirement, PACKAGES),
    ]  # fmt: skip
    return subprocess.run(command, check=False).returncode


def size_mib(path: Path) -> float:
    """Return the size of a file, or of all in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 2**20


def _requirement(name: str) -> str:
    try:
        return f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return name


if __name__ == "__main__":
    sys.exit(main())
