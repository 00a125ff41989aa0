"""Read the project's own sources: where they lie, what they import, what the distribution declares."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels" / "soda_kernels"
ENGINE = ROOT / "engine" / "soda_engine"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _constants(path: Path) -> dict[str, Any]:
    """Read the constants that a file assigns at its top level, without running it."""
    assigned = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    return {ast.unparse(node.targets[0]): ast.literal_eval(node.value) for node in assigned}


SETUP = _constants(ROOT / "setup.py")


@dataclass(frozen=True)
class Import:
    """One module that a file imports, and one name out of it if the statement says `from`."""

    line: int
    module: str
    """Absolute, also where the statement is relative."""
    name: str | None
    on_load: bool
    """Whether it runs when the file is imported: not inside a function, not under TYPE_CHECKING."""

    @property
    def top(self) -> str:
        """The top-level package."""
        return self.module.partition(".")[0]


def imports_of(source: str, package: str) -> list[Import]:
    """List the imports of a file that lies in `package`."""
    return list(_walk(ast.parse(source), package, on_load=True))


def _walk(node: ast.AST, package: str, on_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(child.lineno, alias.name, None, on_load)
        elif isinstance(child, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            module = ".".join([*parents, *([child.module] if child.module else [])])
            for alias in child.names:
                yield Import(child.lineno, module, alias.name, on_load)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from _walk(ast.Module(child.body, []), package, on_load=False)
            yield from _walk(ast.Module(child.orelse, []), package, on_load)
        else:
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, package, on_load and not in_function)


def imports_under(folder: Path) -> Iterator[tuple[Path, Import]]:
    """List every import of every Python file under `folder`, itself a top-level package or a plain folder."""
    for path in sorted(folder.rglob("*.py")):
        package = ".".join(path.parent.relative_to(folder.parent).parts)
        for found in imports_of(path.read_text(), package):
            yield path, found


def tracked_files(*suffixes: str) -> list[Path]:
    """List the files that git knows or would add, with these suffixes if any are named."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


def declared(*extras: str) -> set[str]:
    """Name the distributions that installing with these extras asks for, normalised (`scikit-learn`)."""
    names: set[str] = set()
    for requirement in [*SETUP["DEPENDENCIES"], *(r for extra in extras for r in SETUP["EXTRAS"][extra])]:
        match = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement)
        assert match, requirement
        if match[1] == PROJECT["name"]:
            names |= declared(*match[2].split(","))
        else:
            names.add(normalised(match[1]))
    return names


def normalised(distribution: str) -> str:
    """Write a distribution's name the one way in which two spellings of it compare equal."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
