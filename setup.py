"""Say where the two import packages lie and what each needs, and build the native CPU library with CMake.

The rest of the distribution is in pyproject.toml. The environment variable SODA_NATIVE decides about the library: 0
leaves it out, 1 makes a failed build fail the install, and unset builds it if that is possible and says what happened.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# What soda_kernels needs; Triton only at the first launch on a GPU.
DEPENDENCIES = [
    "torch>=2.11",
    "numpy>=1.26",
    "triton>=3.6; sys_platform == 'linux'",
]

# torchvision is never among the dependencies: no package listed here may bring it.
EXTRAS = {
    # What soda_engine needs.
    "engine": [
        "datasets>=3.0",
        "huggingface_hub>=0.25",
        "kornia>=0.9",
        "matplotlib>=3.8",
        "pillow>=10.0",
        "pyarrow>=15.0",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "tensorboard>=2.16",
        "threadpoolctl>=3.1",
        "torchmetrics>=1.4",
        "tqdm>=4.66",
        "tyro>=0.9",
    ],
    # The engine's own probes, PSNR and SSIM are enough today; torch-fidelity (FID) is left out, since it needs
    # torchvision.
    "eval": ["soda-engine[engine]"],
    "bench": ["jinja2>=3.1", "matplotlib>=3.8", "nvtx>=0.2.10", "pytest>=8.2", "pytest-benchmark>=4.0"],
    # What soda_kernels.integrations.diffusers needs beside soda_kernels.
    "diffusers": ["diffusers>=0.33"],
    "test": [
        "diffusers>=0.33",
        "hypothesis>=6.100",
        "kernels>=0.17",  # Hugging Face's, which has nothing to do with the folder of this name
        "mypy>=1.11",
        "packaging>=24.0",
        "pytest>=8.2",
        "pytest-benchmark>=4.0",
        "pytest-xdist>=3.5",
        "ruff>=0.6",
        "scipy>=1.11",
        "setuptools>=77",
        "types-tqdm",
    ],
    "all": ["soda-engine[engine,eval,bench,diffusers,test]"],
}


class NotBuilt(Exception):
    """Why there is no native library, in one line."""


class BuildNative(build_ext):
    """Build the library into the package's folder, or leave a line there that says why it is missing."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        note = library.with_name("native_build.txt")
        library.parent.mkdir(parents=True, exist_ok=True)
        for stale in (library, note):
            stale.unlink(missing_ok=True)
        try:
            _build(Path(self.build_temp).resolve(), library)
            outcome = "built"
        except NotBuilt as reason:
            if _wish() == "1":
                raise SystemExit(f"SODA_NATIVE=1, and the native CPU library cannot be built: {reason}") from None
            note.write_text(f"{reason}\n")
            outcome = f"left out: {reason}"
        print(f"soda-engine: native CPU library {outcome}", file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        # One binary for every Python: its name has no version.
        return os.path.join(*fullname.split(".")[:-1], "libsoda_kernels.so")

    def copy_extensions_to_source(self) -> None:
        """In an editable install the package's folder is the checkout's."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            package = Path(self.get_finalized_command("build_py").get_package_dir("soda_kernels"))  # type: ignore[attr-defined]
            for name in (built.name, "native_build.txt"):
                (package / name).unlink(missing_ok=True)
                if built.with_name(name).exists():
                    shutil.copyfile(built.with_name(name), package / name)


class WheelForEveryPython(bdist_wheel):
    """The library has no Python in it, so that a wheel belongs to a platform and to no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _wish() -> str | None:
    wish = os.environ.get("SODA_NATIVE") or None
    if wish not in (None, "0", "1"):
        raise SystemExit(f"SODA_NATIVE is {wish!r}; it must be 0, 1 or unset")
    return wish


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return named or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def _torch_folder() -> Path | None:
    """Find the PyTorch of the environment that is installed into, which an isolated build does not have on its path."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path, site.getusersitepackages()]
    folders = [Path(path) / "torch" for path in paths if path]
    return next((f for f in folders if (f / "include/torch/csrc/stable/library.h").is_file()), None)


def _build(folder: Path, library: Path) -> None:
    """Build `library`, with intermediate files in `folder`."""
    if _wish() == "0":
        raise NotBuilt("it was left out by SODA_NATIVE=0")
    if not sys.platform.startswith("linux"):
        raise NotBuilt(f"it is written for Linux, not for {sys.platform}")
    torch, cmake, compiler = _torch_folder(), shutil.which("cmake"), _compiler()
    for what, found in (("C++ compiler", compiler), ("CMake", cmake), ("PyTorch with C++ headers", torch)):
        if found is None:
            raise NotBuilt(f"there was no {what} when the package was installed")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).resolve().parent
    settings = [f"-DTORCH_FOLDER={torch}"]
    if "CXX" not in os.environ:  # which CMake reads itself, with a launcher or flags in it
        settings.append(f"-DCMAKE_CXX_COMPILER={compiler}")
    configure = [cmake, "-S", source, "-B", folder, *generator, *settings]
    for command in (configure, [cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)]):
        finished = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if finished.returncode:
            output = finished.stdout + finished.stderr
            print(output, file=sys.stderr)
            errors = [line.strip() for line in output.splitlines() if "error" in line.lower()] or ["no message"]
            raise NotBuilt(f"its build failed: {errors[0]}")
    shutil.copyfile(folder / library.name, library)


if __name__ == "__main__":
    sources = Path("kernels/csrc")
    setup(
        package_dir={"soda_kernels": "kernels/soda_kernels", "soda_engine": "engine/soda_engine"},
        packages=find_packages("kernels") + find_packages("engine"),
        install_requires=DEPENDENCIES,
        extras_require=EXTRAS,
        ext_modules=[
            Extension(
                "soda_kernels.native",
                sources=[str(path) for path in sorted(sources.glob("*.cpp"))],
                depends=["CMakeLists.txt", *(str(path) for path in sorted(sources.glob("*.h")))],
            )
        ],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelForEveryPython},
    )
