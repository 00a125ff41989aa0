"""Rows of noising, loss and sampler steps: compared on one noise, timed with each provider's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.diffusion.cases import TIMED_CALLS, Call, DiffusionCase
from benchmarks.diffusion.problems import DiffusionProblem, diffusion_problem
from benchmarks.diffusion.providers import DIFFUSION_PROVIDERS, complaints, eager_diffusion, own_diffusion
from benchmarks.families import DIFFUSION
from benchmarks.providers import Provider
from benchmarks.steps import make_step, result_names
from benchmarks.suite import PACES, suite_rows

CPU = torch.device("cpu")
MODES = ("fwd", "bwd", "fwd+bwd")
CASES = DIFFUSION.cases(["tiny"], ["nhwc"], "fp32", timed=True, on_cpu=True)
BY_CALL = {case.call.name: case for case in CASES}
calls = pytest.mark.parametrize("name", BY_CALL)


def with_other_key(problem: DiffusionProblem) -> tuple[Tensor, Tensor]:
    """Noise that is not the key's: as good as any, and not what was asked for."""
    return own_diffusion(dataclasses.replace(problem, seed=problem.seed + 1, noise=None))


def of_two_noises(problem: DiffusionProblem) -> tuple[Tensor, Tensor]:
    """A loss that forgets the noise of its x_t, though what it is handed it uses."""
    if problem.noise is not None:
        return eager_diffusion(problem)
    return eager_diffusion(problem)[0], eager_diffusion(problem)[1]


def too_wide(problem: DiffusionProblem) -> tuple[Tensor, Tensor]:
    """Noise of variance 4 where it draws it."""
    noise = 2 * torch.randn_like(problem.x) if problem.noise is None else problem.noise
    return eager_diffusion(dataclasses.replace(problem, noise=noise))


PROVIDERS = (
    *(provider for provider in DIFFUSION_PROVIDERS if not provider.compiled),
    Provider(name="other-key", build=lambda: with_other_key),
    Provider(name="two-noises", build=lambda: of_two_noises, draws=True),
    Provider(name="too-wide", build=lambda: too_wide, draws=True),
)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str, str], dict[str, Any]]:
    """Every row, by call, provider and mode."""
    measured = suite_rows(DIFFUSION, CASES, MODES, CPU, PACES["quick"], PROVIDERS)
    return {(row["case"]["call"]["name"], row["provider"], row["mode"]): row for rows in measured for row in rows}


@calls
def test_rows_are_of_the_modes_that_a_call_has(rows: dict[tuple[str, str, str], dict[str, Any]], name: str) -> None:
    modes = {mode for call, provider, mode in rows if (call, provider) == (name, "ours")}
    assert modes == (set(MODES) if BY_CALL[name].op == "noising_and_loss" else {"fwd"})
    for mode in modes:
        row = rows[name, "ours", mode]
        assert (row["suite"], row["op"]) == ("diffusion", BY_CALL[name].op)
        assert {"N", "C", "H", "W", "layout", "dtype", "call"} <= row["case"].keys()
        for provider in ("ours", "eager"):
            row = rows[name, provider, mode]
            assert row["status"] == "ok", row["reason"]
            assert row["pct_ceiling"] > 0 and row["bytes_min"] > 0 and row["bound"] in ("memory", "compute")
            assert row["check"]["pass"] and row["check"]["bitwise_rerun"]
    assert rows[name, "eager", "fwd"]["check"]["ratio_to_torch"] == 1.0


@calls
def test_wrong_noise_is_invalid(rows: dict[tuple[str, str, str], dict[str, Any]], name: str) -> None:
    status = {provider: rows[name, provider, "fwd"]["status"] for provider in ("other-key", "two-noises", "too-wide")}
    if not BY_CALL[name].call.draws:
        assert set(status.values()) == {"ok"}
        return
    assert status["other-key"] == status["too-wide"] == "invalid"
    assert "times that of PyTorch's own" in rows[name, "other-key", "fwd"]["reason"]
    assert "its noise is off in variance" in rows[name, "too-wide", "fwd"]["reason"]
    # A sampler's x0 does not depend on the noise of its step.
    if BY_CALL[name].op == "noising_and_loss":
        assert "loss is not of the noise in x_t" in rows[name, "two-noises", "fwd"]["reason"]


@calls
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_what_is_ours_and_what_is_eager_agree_on_the_keys_noise(name: str, layout: str, dtype: str) -> None:
    case = dataclasses.replace(BY_CALL[name], layout=layout, dtype=dtype)
    problem = diffusion_problem(case, CPU, grad=True)
    mode = case.modes[-1]
    eager = make_step(eager_diffusion, problem.with_noise(), mode)()
    ours = make_step(own_diffusion, problem, mode)()
    rtol, atol = {"fp32": (1e-4, 1e-5), "bf16": (3e-2, 3e-2)}[dtype]
    for label, one, other in zip(result_names(problem, mode), ours, eager, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype, label
        assert torch.allclose(one, other, rtol=rtol, atol=atol), label
    assert ours[0].stride() == eager[0].stride()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_noise_that_eager_draws_is_a_normal_to_the_check(mode: str, dtype: str) -> None:
    for call in TIMED_CALLS:
        if mode in call.modes and call.draws:
            case = DiffusionCase(shape_set="t", shape=CASES[0].shape, call=call, layout="nchw", dtype=dtype)
            problem = diffusion_problem(case, CPU, grad=True)
            results = make_step(eager_diffusion, problem, mode)()
            assert complaints(problem, mode, results) == []
            assert complaints(problem, mode, [results[0] + 1, *results[1:]]) != []
    deterministic = diffusion_problem(BY_CALL["ddim-guided-clip"], CPU)
    assert complaints(deterministic, "fwd", make_step(eager_diffusion, deterministic, "fwd")()) == []


def test_a_problem_in_fp64_has_the_noise_of_its_key() -> None:
    for problem in (diffusion_problem(case, CPU) for case in CASES if case.call.draws):
        narrow, wide = problem.with_noise(), problem.double().with_noise()
        assert narrow.noise is not None and wide.noise is not None
        assert wide.noise.dtype == wide.schedule.alpha.dtype == wide.x.dtype == torch.float64
        assert torch.allclose(narrow.noise.double(), wide.noise, atol=1e-5)
        assert narrow.noise.stride() == problem.x.stride()
        assert narrow.with_noise() is narrow
        assert narrow.double().noise is not None and torch.equal(narrow.double().noise, narrow.noise.double())


def test_no_noise_where_none_is_drawn() -> None:
    problem = diffusion_problem(BY_CALL["ddim-guided-clip"], CPU)
    assert problem.with_noise() is problem
    assert not Call(op="denoising_loss", name="x0", target="x0").draws


@pytest.mark.slow
def test_a_compiled_backward_is_repeated_after_one_that_may_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What "fwd+bwd" left in the cache on disk would differentiate its own result the second time."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = next(case for case in DIFFUSION.cases(["cifar"], ["nchw"], "fp32", timed=True) if case.call.name == "eps")
    compiled = [provider for provider in DIFFUSION_PROVIDERS if provider.compiled]
    for mode in ("fwd+bwd", "bwd"):
        (rows,) = suite_rows(DIFFUSION, [case], [mode], CPU, PACES["quick"], compiled)
        assert [(row["status"], row["reason"]) for row in rows] == [("ok", None)], mode
