"""Writes this package for Hugging Face's `kernels`: sources alone, importing nothing of soda_kernels.

    build/torch-cpu/     build/torch-cuda/     build/torch-rocm/
        metadata.json    what the loader reads: the name, and the id that the package is imported as
        __init__.py      the public names, and `layers`
        ...              this package's files, their imports made relative

The loader imports a variant under its id, `_soda_kernels_<backend>_<hash>`, and its ops are registered under that name:
beside an installed soda_kernels, and beside other versions. The hash is of the files, so that the same sources are the
same package.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from pathlib import Path, PurePosixPath

PACKAGE = Path(__file__).parents[2]
NAME = "soda-kernels"
BACKENDS = ("cpu", "cuda", "rocm")
VERSION = 1
"""A kernel repository's version: one more where a layer or a public function changes for its callers."""

LEAST_KERNELS = "0.17.0"
"""The oldest `kernels` whose loader this layout was tested with."""

# What a model does not run: the other integrations, and descriptions for compiling ahead of time.
_LEFT_OUT = ("integrations", "aot.py")
_LAYERS = PACKAGE / "integrations" / "hub" / "layers.py"
_NO_LIBRARY = "the package for Hugging Face's kernels has none"

_CARD = """---
library_name: kernels
license: apache-2.0
---

# soda-kernels

Fused Triton kernels for diffusion models: modulated group norm (GroupNorm, scale and shift, SiLU), attention at U-Net
lengths, noising, denoising loss and sampler steps. CPU tensors run the reference in plain PyTorch,
and of attention PyTorch's own kernel.

    import torch
    from pathlib import Path
    from kernels import get_local_kernel

    soda = get_local_kernel(Path("."))
    x, scale, shift = torch.randn(2, 32, 8, 8), torch.randn(2, 32), torch.randn(2, 32)
    y = soda.modulated_group_norm(x, 8, modulations=[(scale, shift)])

`layers` has `GroupNorm`, `GroupNormSiLU` and `ModulatedGroupNorm` for `kernelize`, each with a backward and without
graph breaks under torch.compile. They read num_groups, eps, weight and bias of the layer that they stand in for.
"""


def write_package(out: Path) -> list[Path]:
    """Write the package into a folder, which then is a kernel repository.

    Args:
        out: the folder; its README.md and the variants of this package in its `build/` are replaced.

    Returns:
        The folders of the variants.
    """
    files = sources()
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:8]
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(_CARD)
    return [_write_variant(out / "build" / f"torch-{backend}", files, backend, digest) for backend in BACKENDS]


def sources() -> dict[str, str]:
    """Return the files of the package by their path in it, without metadata."""
    paths = [path for path in sorted(PACKAGE.rglob("*")) if path.suffix in (".py", ".json")]
    found = {path.relative_to(PACKAGE).as_posix(): path for path in paths}
    found = {name: path for name, path in found.items() if PurePosixPath(name).parts[0] not in _LEFT_OUT}
    found["layers.py"] = _LAYERS
    files = {
        name: relative(path.read_text(), depth=name.count("/")) if path.suffix == ".py" else path.read_text()
        for name, path in found.items()
    }
    files["__init__.py"] += '\nfrom . import layers\n\n__all__ += ["layers"]\n'
    # Read by the package's _native.py.
    files["native_build.txt"] = f"{_NO_LIBRARY}\n"
    return files


def relative(source: str, depth: int) -> str:
    """Make a module's imports of soda_kernels relative.

    Args:
        source: its text.
        depth: how many folders below the package it lies.

    Raises:
        ValueError: it imports soda_kernels in another way than `from soda_kernels... import`.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(_is_own(alias.name) for alias in node.names):
            raise ValueError(f"line {node.lineno} imports soda_kernels by name; write `from soda_kernels import ...`")
        if isinstance(node, ast.ImportFrom) and node.module and not node.level and _is_own(node.module):
            below = node.module.removeprefix("soda_kernels").removeprefix(".")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {'.' * (depth + 1)}{below} ", 1)
    return "".join(lines)


def _is_own(module: str) -> bool:
    return module.partition(".")[0] == "soda_kernels"


def _write_variant(folder: Path, files: dict[str, str], backend: str, digest: str) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    metadata = {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{backend}_{digest}",
        "version": VERSION,
        "license": "Apache-2.0",
        "kernels-minver": LEAST_KERNELS,
        "python-depends": [],
        "backend": {"type": backend},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder
