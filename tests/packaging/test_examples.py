"""Every Python example of the documents and docstrings: it is run here, or named here with the reason why not."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.packaging.source_tree import ENGINE, KERNELS, ROOT, tracked_files

Example = tuple[str, str]
"""Where an example stands, and its first line."""

NOT_EXAMPLES: dict[Example, str] = {
    ("kernels/soda_kernels/group_norm/README.md", "dx = rstd * (S * dp - c1 - x_hat * c2)"): "a formula",
    (
        "kernels/soda_kernels/group_norm/README.md",
        "dx = dr = k * (rstd * (S * dp - c1 - s_hat * c2) + ds)",
    ): "a formula",
    ("kernels/soda_kernels/group_norm/reference.py", "dx = rstd * (S * dp - c1 - x_hat * c2)"): "a formula",
}
"""What reads as Python and is not run, with the reason."""


def trained_model() -> dict[str, Any]:
    """Save a model where the example has a run, with images for it. Nothing was trained."""
    from soda_engine import Soda
    from tests.engine.tiny_soda import tiny_config

    model = Soda(tiny_config())
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    model.save_pretrained("runs/cifar10")
    return {"images": images}


def pipeline() -> dict[str, Any]:
    """Build a pipeline of diffusers, under the names that examples have for it."""
    from diffusers import DDPMPipeline, DDPMScheduler

    from soda_kernels.integrations.diffusers import SodaScheduler
    from tests.integration.peers import unet

    made = DDPMPipeline(unet=unet(), scheduler=DDPMScheduler())
    return {"pipe": made, "pipeline": made, "SodaScheduler": SodaScheduler}


def hub_package() -> dict[str, Any]:
    """Write the package that `make hub` writes, and a model for `kernelize`."""
    from soda_kernels.integrations.hub.package import write_package

    write_package(Path("dist/hub"))
    return {"model": nn.Linear(2, 2)}


def model_with_norms() -> dict[str, Any]:
    return {"model": nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())}


BEFORE: dict[Example, Callable[[], dict[str, Any]]] = {
    ("README.md", "import soda_engine"): trained_model,
    ("kernels/README.md", "from soda_kernels.integrations.diffusers import SodaScheduler"): pipeline,
    ("kernels/README.md", "from pathlib import Path"): hub_package,
    ("kernels/soda_kernels/integrations/diffusers/__init__.py",
     "from soda_kernels.integrations.diffusers import SodaScheduler, optimize"): pipeline,
    ("kernels/soda_kernels/integrations/diffusers/scheduler.py",
     "pipe.scheduler = SodaScheduler.from_config(pipe.scheduler.config)"): pipeline,
    ("kernels/soda_kernels/integrations/torch/__init__.py",
     "from soda_kernels.integrations.torch import optimize"): model_with_norms,
}  # fmt: skip
"""What makes the names and files that an example takes for granted."""


def code_blocks(text: str) -> Iterator[str]:
    """Yield a text's fenced blocks, and its indented ones that an empty line or the text's beginning precedes."""
    block: list[str] = []
    fenced, after_empty = False, True
    for line in [*text.splitlines(), "the end"]:
        if line.startswith("```"):
            if block:
                yield textwrap.dedent("\n".join(block))
            block, fenced = [], not fenced
        elif fenced or (block and not line.strip()) or (line.startswith("    ") and (block or after_empty)):
            block.append(line)
        elif block:
            yield textwrap.dedent("\n".join(block))
            block = []
        after_empty = not line.strip()


def is_python(block: str) -> bool:
    """Tell whether a block is Python: it imports something, even where the rest is wrong, or parses."""
    if re.search(r"^(?:import [\w.]+( as \w+)?$|from [\w.]+ import )", block, flags=re.MULTILINE):
        return True
    try:
        return bool(ast.parse(block).body)
    except SyntaxError:
        return False


def texts() -> Iterator[tuple[str, str]]:
    """Yield the documents, but the one that is written from docstrings, and the docstrings of what is public."""
    for path in tracked_files(".md"):
        if path != ROOT / "kernels" / "API.md":
            yield str(path.relative_to(ROOT)), path.read_text()
    for path in tracked_files(".py"):
        if path.is_relative_to(KERNELS) or path.is_relative_to(ENGINE):
            for docstring in docstrings(path.read_text()):
                yield str(path.relative_to(ROOT)), docstring


def docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module and of its public functions, classes and methods."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) or getattr(node, "name", "").startswith(
            "_"
        ):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if docstring is not None:
            # Not cleaned, which would dedent an example that is all there is below the first line.
            yield re.sub("^" + " " * node.body[0].col_offset, "", docstring, flags=re.MULTILINE)


def examples() -> list[tuple[Example, str]]:
    """List the blocks of Python, each once."""
    found = [((place, block.splitlines()[0]), block) for place, text in texts() for block in code_blocks(text)]
    return [(example, block) for example, block in found if is_python(block)]


try:
    EXAMPLES = [(example, block) for example, block in examples() if example not in NOT_EXAMPLES]
except pytest.skip.Exception as reason:
    pytest.skip(str(reason), allow_module_level=True)


@pytest.mark.parametrize(("example", "block"), EXAMPLES, ids=[": ".join(example) for example, _ in EXAMPLES])
def test_example(example: Example, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, example[0], "exec"), BEFORE.get(example, dict)())


def test_what_is_named_here_exists() -> None:
    found = [example for example, _ in examples()]
    assert len(set(found)) == len(found), "two examples of one document begin alike: they cannot be told apart here"
    assert {*NOT_EXAMPLES, *BEFORE} <= set(found)


TEXT = """    first = 1

Words, and a list:

- item
    continued

    import wrong(

    still = "the same"

```sh
make demo
```

```python
fenced = 1
```

    make test

Args:
    x: no block.
"""


def test_rule_of_blocks() -> None:
    blocks = [block.strip() for block in code_blocks(TEXT)]
    assert blocks == ["first = 1", 'import wrong(\n\nstill = "the same"', "make demo", "fenced = 1", "make test"]
    assert [is_python(block) for block in blocks] == [True, False, False, True, False]
    assert is_python("from torch import nn\n\nmodel = (")
    source = '"""a\n\n    x = 1\n"""\ndef f():\n  """b\n\n      y = 1\n  """\nclass C:\n  "c"\n  def _d(self):\n    "d"'
    assert list(docstrings(source)) == ["a\n\n    x = 1\n", "b\n\n    y = 1\n", "c"]
