"""The direction of the imports: benchmarks, tests → soda_engine → soda_kernels → torch, and no further."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import soda_kernels
from tests.packaging.source_tree import ENGINE, KERNELS, ROOT, Import, declared, imports_of, imports_under, normalised

PUBLIC = frozenset(soda_kernels.__all__)
IMPLEMENTATIONS = frozenset({"reference", "triton_impl"})
"""The files of a family that compute; each is written from the mathematics alone."""


def breach_of_kernels(path: Path, found: Import) -> str | None:
    """Say which rule of soda_kernels an import breaks, if any: Triton only in files with triton in their names.

    An integration imports the project that it is for, and nothing imports an integration.
    """
    in_triton_file = "triton" in path.stem
    if found.top in ("soda_engine", "benchmarks", "tests"):
        return f"{found.top} is above soda_kernels"
    target = {found.module.rpartition(".")[2], found.name}
    if path.stem in IMPLEMENTATIONS and found.top == "soda_kernels" and target & (IMPLEMENTATIONS - {path.stem}):
        return "implementations do not import one another"
    if not found.on_load or in_triton_file:
        return None
    of_integration = "integrations" in path.parts
    if found.module.startswith("soda_kernels.integrations") and not of_integration:
        return "an integration is imported by its own name alone"
    if of_integration and path.name != "__init__.py" and found.top == path.parent.name:
        return None
    if found.top == "soda_kernels" and any("triton" in part for part in target if part):
        return "a file with Triton in it is imported inside the function that launches it"
    if found.top not in {"torch", "numpy", "soda_kernels", *sys.stdlib_module_names}:
        return f"{found.top} is not torch, NumPy or the standard library"
    return None


def breach_of_engine(found: Import) -> str | None:
    """Say which rule of soda_engine an import breaks, if any: the public names of soda_kernels, and never Triton."""
    if found.top in ("triton", "benchmarks", "tests"):
        return f"soda_engine does not import {found.top}"
    if found.top == "soda_kernels":
        if found.module != "soda_kernels":
            return "a module inside soda_kernels is not public"
        if found.name is not None and found.name not in PUBLIC:
            return f"{found.name} is not in soda_kernels.__all__"
    return None


def private_attributes(source: str) -> list[str]:
    """List the attributes of soda_kernels that a file uses and `soda_kernels.__all__` does not have."""
    tree = ast.parse(source)
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "soda_kernels"
    }
    return [
        f"{node.lineno}: soda_kernels.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases
        if node.attr not in PUBLIC
    ]


def listed(path: Path, found: Import, breach: str) -> str:
    """Write one breach as `file:line: what`."""
    return f"{path.relative_to(ROOT)}:{found.line}: {breach}"


def test_kernels_import_only_what_lies_below() -> None:
    found = [(path, item, breach_of_kernels(path, item)) for path, item in imports_under(KERNELS)]
    assert found, "no import was read"
    assert not [listed(path, item, breach) for path, item, breach in found if breach]


def test_engine_imports_only_public_names_of_kernels() -> None:
    found = [(path, item, breach_of_engine(item)) for path, item in imports_under(ENGINE)]
    assert found, "no import was read"
    assert not [listed(path, item, breach) for path, item, breach in found if breach]
    private = {str(path.relative_to(ROOT)): private_attributes(path.read_text()) for path in ENGINE.rglob("*.py")}
    assert not {path: names for path, names in private.items() if names}


@pytest.mark.parametrize(
    ("file", "statement", "breach"),
    [
        ("api.py", "import triton", "triton is not torch"),
        ("api.py", "try:\n    import triton\nexcept ImportError:\n    pass", "triton is not torch"),
        ("ops.py", "from .triton_impl import launch", "imported inside the function"),
        ("ops.py", "from . import triton_impl", "imported inside the function"),
        ("ops.py", "def run():\n    from .triton_impl import launch", None),
        ("ops.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton", None),
        ("triton_impl.py", "import triton", None),
        ("triton_impl.py", "from .reference import forward", "one another"),
        ("reference.py", "from ..diffusion import triton_impl", "one another"),
        ("reference.py", "from ..diffusion.api import add_noise", None),
        ("api.py", "def run():\n    import soda_engine", "above"),
        ("api.py", "import einops", "einops is not torch"),
        ("api.py", "import soda_kernels.integrations.diffusers", "by its own name"),
        ("integrations/diffusers/scheduler.py", "import diffusers", None),
        ("integrations/diffusers/scheduler.py", "import transformers", "transformers is not torch"),
        ("integrations/diffusers/__init__.py", "import diffusers", "diffusers is not torch"),
    ],
)
def test_rule_of_kernels(file: str, statement: str, breach: str | None) -> None:
    found = [breach_of_kernels(Path(file), item) for item in imports_of(statement, "soda_kernels.group_norm")]
    breaches = [item for item in found if item]
    assert (breach in breaches[0]) if breach else not breaches


@pytest.mark.parametrize(
    ("statement", "breaks"),
    [
        ("from soda_kernels import " + sorted(PUBLIC)[0], False),
        ("from soda_kernels import _library", True),
        ("from soda_kernels.group_norm.api import modulated_group_norm", True),
        ("import soda_kernels.group_norm", True),
        ("def run():\n    import triton.language as tl", True),
        ("from tests.numerics import error", True),
        ("import soda_kernels as sk\nsk." + sorted(PUBLIC)[0], False),
        ("import soda_kernels as sk\nsk._library.define()", True),
    ],
)
def test_rule_of_engine(statement: str, breaks: bool) -> None:
    breaches = [breach_of_engine(item) for item in imports_of(statement, "soda_engine.models")]
    assert bool(any(breaches) or private_attributes(statement)) == breaks


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("engine/soda_engine", ["engine"]), ("tests", ["engine", "test"]), ("benchmarks", ["engine", "bench", "test"])],
)
def test_third_party_imports_are_declared(folder: str, extras: list[str]) -> None:
    distributions = importlib.metadata.packages_distributions()
    own = {"soda_engine", "soda_kernels", "benchmarks", "tests"}
    undeclared = [
        f"{path.relative_to(ROOT)}:{item.line}: {item.top}"
        for path, item in imports_under(ROOT / folder)
        if item.top not in own | sys.stdlib_module_names
        if not {normalised(name) for name in distributions.get(item.top, [])} & declared(*extras)
    ]
    assert not undeclared


def required_by(*distributions: str) -> set[str]:
    """Name the installed distributions that these need in turn, themselves included."""
    seen: set[str] = set()
    waiting = [Requirement(name) for name in distributions]
    while waiting:
        requirement = waiting.pop()
        name = normalised(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        try:
            further = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            continue  # not needed on this platform
        wanted = [{"extra": extra} for extra in ("", *requirement.extras)]
        waiting += [item for item in further if not item.marker or any(item.marker.evaluate(env) for env in wanted)]
    return seen


def test_nothing_brings_torchvision() -> None:
    assert "torchvision" not in required_by(*declared("all"))


USE_KERNELS = """
import json, sys

allowed = set(json.loads(sys.argv[1])) | set(sys.stdlib_module_names)

class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{name} is refused", name=name)

if sys.argv[2] == "refuse":
    sys.meta_path.insert(0, Refuse)

import torch
before = "triton" in sys.modules
import soda_kernels
x = torch.randn(2, 8, 5, 3, generator=torch.Generator().manual_seed(0))
y = soda_kernels.modulated_group_norm(x, 4)
torch.testing.assert_close(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4)))
assert ("triton" in sys.modules) == before, "soda_kernels imported Triton"
assert "soda_engine" not in sys.modules, "soda_kernels imported soda_engine"
"""


@pytest.mark.parametrize("others", ["refuse", "allow"])
def test_kernels_need_torch_alone(others: str) -> None:
    below = required_by("torch", "numpy") - {"triton"}
    modules = [
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if below & {normalised(name) for name in distributions}
    ]
    command = [sys.executable, "-c", USE_KERNELS, json.dumps(["soda_kernels", *modules]), others]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert finished.returncode == 0, finished.stderr
