"""The gate lets nothing through that computes something else, and says what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.accuracy import check_step, relative_error
from benchmarks.steps import Step
from soda_kernels import modulated_group_norm, native_status
from soda_kernels._native import poisoned_results

EXACT = torch.linspace(1, 2, 1000, dtype=torch.float64)
OWN = EXACT.float() * (1 + 1e-4)


def step_with_error(relative: float) -> Step:
    return lambda: ((EXACT * (1 + relative)).float(),)


def test_relative_error_is_of_the_norms() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5


def test_twice_the_error_of_torch_passes_and_thrice_does_not() -> None:
    passed = check_step(step_with_error(1.9e-4), ["y"], [OWN], [EXACT])
    assert not passed.problems
    assert passed.ratio_to_torch == pytest.approx(1.9, rel=0.01)
    assert passed.rel_l2 == pytest.approx(1.9e-4, rel=0.01)
    failed = check_step(step_with_error(3e-4), ["y"], [OWN], [EXACT])
    assert failed.problems == ("the error of y is 3 times that of PyTorch's own",)
    assert not failed.to_dict()["pass"]
    assert not check_step(step_with_error(3e-4), ["y"], [OWN], [EXACT], most_times_torch=10.0).problems


def test_a_lucky_own_error_of_nothing_does_not_fail_a_rounded_result() -> None:
    check = check_step(step_with_error(5e-8), ["y"], [EXACT.float()], [EXACT])
    assert not check.problems


def test_an_unwritten_output_is_found() -> None:
    def step() -> tuple[Tensor, ...]:
        y = torch.empty_like(OWN)
        y[:-1] = OWN[:-1]
        return (y,)

    assert check_step(step, ["y"], [OWN], [EXACT]).problems == ("y has values that are not finite, or was not written",)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_native_librarys_results_are_poisoned_too() -> None:
    if not native_status().available:
        pytest.skip(str(native_status()))
    x = torch.randn(1, 4, 3)
    with poisoned_results() as counts:
        y = modulated_group_norm(x, 2)
    assert counts == [3]  # y, mean and rstd
    assert torch.equal(modulated_group_norm(x, 2), y)


def test_the_worst_result_is_named_and_every_one_is_judged() -> None:
    def step() -> tuple[Tensor, ...]:
        return OWN, (EXACT * (1 + 5e-4)).float(), OWN.double(), OWN[:1]

    check = check_step(step, ["y", "dx", "dweight", "dbias"], [OWN] * 4, [EXACT] * 4)
    assert check.worst == "dx"
    assert [problem.split()[0] for problem in check.problems] == ["the", "dweight", "dbias"]
    assert "error of dx is 5 times" in check.problems[0]


def test_a_result_that_changes_from_run_to_run_is_noted() -> None:
    calls = iter([0.0, 1e-5])
    check = check_step(lambda: (OWN * (1 + next(calls)),), ["y"], [OWN], [EXACT])
    assert not check.bitwise_rerun
    assert check_step(lambda: (OWN,), ["y"], [OWN], [EXACT]).bitwise_rerun
