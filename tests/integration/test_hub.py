"""The package for Hugging Face's `kernels`: loaded as a user loads it, with soda_kernels out of reach and beside it."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import kernels
import pytest
import torch
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_forward_from_hub
from torch import Tensor, nn
from torch.nn import functional as F

import soda_kernels
from soda_kernels.integrations.hub.__main__ import main
from soda_kernels.integrations.hub.package import BACKENDS, relative, write_package
from tests.numerics import assert_accurate
from tests.packaging.source_tree import ROOT

SHAPE, GROUPS = (2, 8, 5, 3), 4


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "repository"
    write_package(out)
    return out


@pytest.fixture(scope="module")
def loaded(package: Path) -> ModuleType:
    return get_local_kernel(package)


def test_kernels_is_hugging_face_s_and_not_the_folder_of_this_name() -> None:
    assert kernels.__file__ is not None and not Path(kernels.__file__).is_relative_to(ROOT / "kernels")


ALONE = """
import sys
from pathlib import Path

class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("soda_kernels", "soda_engine"):
            raise ModuleNotFoundError(f"{name} is refused", name=name)

sys.meta_path.insert(0, Refuse)

import torch
from torch.nn import functional as F
from kernels import get_local_kernel

package = Path(sys.argv[1])
soda = get_local_kernel(package)
assert Path(soda.__file__).is_relative_to(package), soda.__file__
assert not soda.native_status().available
assert soda.native_status().reason == "the package for Hugging Face's kernels has none", soda.native_status()

x, weight, bias, scale, shift = inputs = [
    torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 8, 5, 3), (8,), (8,), (2, 8), (2, 8))
]

def step(norm):
    y = norm(*inputs)
    return y, *torch.autograd.grad(y.square().sum(), inputs)

def fused(x, weight, bias, scale, shift):
    return soda.modulated_group_norm(x, 4, weight, bias, [(scale, shift)])

def composition(x, weight, bias, scale, shift):
    return F.silu(F.group_norm(x, 4, weight, bias) * (1 + scale[..., None, None]) + shift[..., None, None])

for run in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
    torch.testing.assert_close(step(run), step(composition))

q = torch.randn(2, 7, 3, 16)
torch.testing.assert_close(
    soda.attention(q, q, q).transpose(1, 2), F.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3)
)
schedule, key = soda.NoiseSchedule.cosine(10), {"seed": 1, "sample_ids": [0, 1]}
x0, index = torch.randn(2, 3, 4, 4), torch.tensor([3, 8])
noise = soda.philox_normal(x0.shape, **key)
x_t = soda.add_noise(x0, index, schedule, **key)
torch.testing.assert_close(x_t[1], schedule.alpha[8] * x0[1] + schedule.sigma[8] * noise[1])
assert soda.denoising_loss(noise, x0, index, schedule, **key).max() == 0
print(soda.__name__, *sorted(name for name in sys.modules if name.partition(".")[0] == "soda_kernels"))
"""


def test_it_runs_where_soda_kernels_cannot_be_imported(package: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", ALONE, str(package)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == [identity(package, "cpu")]


def identity(package: Path, backend: str) -> str:
    return json.loads((package / "build" / f"torch-{backend}" / "metadata.json").read_text())["id"]


def test_its_card_s_example_runs(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (package / "README.md").read_text()
    example = "\n".join(re.findall(r"^    (.*)", card, flags=re.MULTILINE))
    monkeypatch.chdir(package)
    names: dict[str, object] = {}
    exec(example, names)
    assert isinstance(names["y"], Tensor) and names["y"].shape == (2, 32, 8, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_variant_is_sources_alone_and_imports_relatively(package: Path, backend: str) -> None:
    variant = package / "build" / f"torch-{backend}"
    assert {path.suffix for path in variant.rglob("*") if path.is_file()} <= {".py", ".json", ".txt"}
    paths = sorted(variant.rglob("*.py"))
    assert {"layers.py", "group_norm", "attention", "diffusion"} <= {
        path.relative_to(variant).parts[0] for path in paths
    }
    third_party = {"torch", "numpy", "triton", "nvtx", *sys.stdlib_module_names}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            elif isinstance(node, ast.ImportFrom):
                folder = path.parents[node.level - 1]
                assert folder.is_relative_to(variant)
                target = folder.joinpath(*(node.module or "").split("."))
                assert target.is_dir() or target.with_suffix(".py").is_file(), f"{path}:{node.lineno}"
            assert {name.partition(".")[0] for name in names} <= third_party, f"{path}:{node.lineno}"


def test_each_variant_has_its_own_name_and_the_same_sources_the_same(package: Path, tmp_path: Path) -> None:
    names = [identity(package, backend) for backend in BACKENDS]
    assert len({*names, "soda_kernels"}) == 4
    write_package(tmp_path)
    assert [identity(tmp_path, backend) for backend in BACKENDS] == names


def test_writing_again_leaves_nothing_old(tmp_path: Path) -> None:
    (old,) = [path for path in write_package(tmp_path) if path.name == "torch-cpu"]
    (old / "gone.py").touch()
    write_package(tmp_path)
    assert not (old / "gone.py").exists() and (old / "__init__.py").exists()


def test_both_are_registered_side_by_side(loaded: ModuleType) -> None:
    x = torch.randn(SHAPE)
    ran = [
        soda_kernels.explain(soda_kernels.modulated_group_norm, x, GROUPS).choices,
        loaded.explain(loaded.modulated_group_norm, x, GROUPS).choices,
        loaded.explain(soda_kernels.modulated_group_norm, x, GROUPS).choices,
    ]
    assert [len(choices) for choices in ran] == [1, 1, 0]
    assert ran[1][0].backend == "reference"
    for name in ("modulated_group_norm", "sampler_step", "attention"):
        ours, theirs = (getattr(getattr(torch.ops, ops), name) for ops in ("soda_kernels", loaded.__name__))
        assert str(ours.default._schema).split("::")[1] == str(theirs.default._schema).split("::")[1]
        assert ours.default is not theirs.default
    torch.testing.assert_close(loaded.modulated_group_norm(x, GROUPS), soda_kernels.modulated_group_norm(x, GROUPS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_its_triton_kernels_run_in_the_interpreter(loaded: ModuleType, layout: torch.memory_format) -> None:
    x, scale, shift = torch.randn(SHAPE).to(memory_format=layout), *torch.randn(2, SHAPE[0], SHAPE[1])
    options = (None, None, None, None, [scale, shift], GROUPS, 1.0, 1e-5, True, 0.0, None, 1.0)
    y, *_ = importlib.import_module(f"{loaded.__name__}.group_norm.triton_impl").forward(x, *options)
    composition = modulated(x, scale, shift)
    assert_accurate(y, composition, modulated(x.double(), scale.double(), shift.double()))
    for family in ("attention", "diffusion"):
        importlib.import_module(f"{loaded.__name__}.{family}.triton_impl")


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS) * (1 + scale[..., None, None]) + shift[..., None, None])


@use_kernel_forward_from_hub("GroupNorm")
class Plain(nn.GroupNorm):
    pass


@use_kernel_forward_from_hub("GroupNormSiLU")
class Activated(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


@use_kernel_forward_from_hub("ModulatedGroupNorm")
class Modulated(nn.GroupNorm):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.silu(super().forward(x) * (1 + scale) + shift)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.activated, self.modulated = (kind(GROUPS, SHAPE[1]) for kind in (Plain, Activated, Modulated))
        self.scale_and_shift = nn.Linear(6, 2 * SHAPE[1])
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift(z)[..., None, None].chunk(2, dim=1)
        return self.modulated(self.activated(self.plain(x)), scale, shift)


def results(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, z = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in (SHAPE, (SHAPE[0], 6)))
    y = model(x, z)
    inputs = {"x": x, "z": z, **dict(model.named_parameters())}
    return {"y": y, **dict(zip(inputs, torch.autograd.grad(y.square().sum(), list(inputs.values())), strict=True))}


@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_kernelized_model_computes_what_it_did(
    package: Path, loaded: ModuleType, mode: Mode, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = Model().to(dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    composition, exact = results(model, dtype), results(_copied(model).double(), torch.float64)
    layers = ("GroupNorm", "GroupNormSiLU", "ModulatedGroupNorm")
    mapping = {name: {"cpu": LocalLayerRepository(package, layer_name=name)} for name in layers}
    with kernels.use_kernel_mapping(mapping):
        kernelize(model, mode=mode, device="cpu", use_fallback=False)
    for layer, name in zip((model.plain, model.activated, model.modulated), layers, strict=True):
        assert layer.forward.__func__ is getattr(loaded.layers, name).forward
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if Mode.TORCH_COMPILE in mode else model
    for name, actual in results(run, dtype).items():
        name = name.removeprefix("_orig_mod.")
        assert_accurate(actual, composition[name], exact[name], name)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def _copied(model: Model) -> Model:
    twin = Model()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize(
    ("source", "depth", "written"),
    [
        ("from soda_kernels import _checks", 0, "from . import _checks"),
        ("from soda_kernels._checks import check", 1, "from .._checks import check"),
        ("def run():\n    from soda_kernels.a import b", 1, "def run():\n    from ..a import b"),
        ("from soda_kernels.a.b import (\n    c,\n)", 1, "from ..a.b import (\n    c,\n)"),
        ("import torch\nfrom soda_kernels_of_others import a", 1, "import torch\nfrom soda_kernels_of_others import a"),
    ],
)
def test_imports_become_relative(source: str, depth: int, written: str) -> None:
    assert relative(source, depth) == written


def test_an_import_by_name_is_refused() -> None:
    with pytest.raises(ValueError, match="line 2 imports soda_kernels by name"):
        relative("import torch\nimport soda_kernels.attention as a", 0)


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out")]) == 0
    assert f"wrote {tmp_path / 'out' / 'build' / 'torch-cuda'}" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
