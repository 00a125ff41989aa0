"""The ops that are measured, each as the commands see it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.attention import cases as attention_cases
from benchmarks.attention import metering as attention_metering
from benchmarks.attention import plans as attention_plans
from benchmarks.attention import problems as attention_problems
from benchmarks.attention import providers as attention_providers
from benchmarks.cases import ShapeSet
from benchmarks.convolution import cases as convolution_cases
from benchmarks.convolution import problems as convolution_problems
from benchmarks.convolution import providers as convolution_providers
from benchmarks.diffusion import cases as diffusion_cases
from benchmarks.diffusion import metering as diffusion_metering
from benchmarks.diffusion import plans as diffusion_plans
from benchmarks.diffusion import problems as diffusion_problems
from benchmarks.diffusion import providers as diffusion_providers
from benchmarks.group_norm import cases as norm_cases
from benchmarks.group_norm import metering as norm_metering
from benchmarks.group_norm import plans as norm_plans
from benchmarks.group_norm import problems as norm_problems
from benchmarks.group_norm import providers as norm_providers
from benchmarks.providers import Provider
from benchmarks.steps import Forward, Problem, Step
from soda_kernels import conv3x3, modulated_group_norm
from soda_kernels.attention import config as attention_config
from soda_kernels.diffusion import config as diffusion_config
from soda_kernels.group_norm import config as norm_config


@dataclass(frozen=True, kw_only=True)
class Family:
    """One op, or a few that go together, as the command `run` sees it: cases, what is counted of them, who computes."""

    name: str
    suite: str
    shapes: Mapping[str, ShapeSet]
    layouts: tuple[str, ...]
    list_cases: Callable[..., list[Any]]
    list_timed_cases: Callable[..., list[Any]] | None = None
    """Those that `run` times, where they are others than `traffic` counts and `tune` tunes."""
    problem: Callable[..., Problem]
    """Draws the tensors of a case on a device."""
    floor_bytes: Callable[[Any, str], int]
    flops: Callable[[Any, str], int]
    own: Forward
    """What this project offers for it."""
    plain: Forward
    """PyTorch's own chain, whose error is the measure of everyone's."""
    providers: tuple[Provider, ...]
    complaints: Callable[[Any, str, Sequence[Tensor]], list[str]] = lambda *_: []
    """Says what is wrong with results of a mode that depend on noise which only who computed them knows."""

    def cases(
        self, shape_sets: Sequence[str], layouts: Sequence[str], dtype: str, *, timed: bool = False,
        on_cpu: bool = False,
    ) -> list[Any]:  # fmt: skip
        """List the cases of those shape sets and layouts that it has, or of what is timed."""
        sets = [name for name in shape_sets if name in self.shapes]
        list_cases = (timed and self.list_timed_cases) or self.list_cases
        return list_cases(sets, [each for each in layouts if each in self.layouts], dtype, on_cpu=on_cpu)


@dataclass(frozen=True, kw_only=True)
class TritonFamily(Family):
    """A family with Triton kernels, as `traffic` and `tune` see it: how those are run.

    Its table of tuned configs has its name.
    """

    plan: Callable[..., Any]
    """Plans the launches of a problem, by a given config or the one that would run."""
    step: Callable[[Any, str, Any], Step]
    """Returns the call that runs one config on a problem."""
    metered_bytes: Callable[[Any, str, Any], Any]
    describe: Callable[[Any, str], Any]
    """Says what the choice of a config sees of a problem, or None where there is no choice."""
    candidates: Callable[[Any], Iterator[Any]]
    heuristic: Callable[[Any, int], Any]


GROUP_NORM = TritonFamily(
    name="group_norm",
    suite="norm",
    shapes=norm_cases.NORM_SHAPES,
    layouts=norm_cases.LAYOUTS,
    list_cases=norm_cases.norm_cases,
    problem=norm_problems.norm_problem,
    floor_bytes=norm_cases.norm_floor_bytes,
    flops=norm_cases.norm_flops,
    own=modulated_group_norm,
    plain=norm_providers.eager_norm,
    providers=norm_providers.NORM_PROVIDERS,
    plan=norm_plans.plan_problem,
    step=norm_plans.problem_step,
    metered_bytes=norm_metering.metered_bytes,
    describe=norm_plans.describe_problem,
    candidates=norm_config.candidates,
    heuristic=norm_config.heuristic,
)

ATTENTION = TritonFamily(
    name="attention",
    suite="attention",
    shapes=attention_cases.ATTENTION_SHAPES,
    layouts=attention_cases.LAYOUTS,
    list_cases=attention_cases.attention_cases,
    problem=attention_problems.attention_problem,
    floor_bytes=attention_cases.attention_floor_bytes,
    flops=attention_cases.attention_flops,
    own=attention_providers.own_attention,
    plain=attention_providers.math_attention,
    providers=attention_providers.ATTENTION_PROVIDERS,
    plan=attention_plans.plan_problem,
    step=attention_plans.problem_step,
    metered_bytes=attention_metering.metered_bytes,
    describe=attention_plans.describe_problem,
    candidates=attention_config.candidates,
    heuristic=attention_config.heuristic,
)

DIFFUSION = TritonFamily(
    name="diffusion",
    suite="diffusion",
    shapes=diffusion_cases.DIFFUSION_SHAPES,
    layouts=diffusion_cases.LAYOUTS,
    list_cases=diffusion_cases.diffusion_cases,
    list_timed_cases=diffusion_cases.timed_cases,
    problem=diffusion_problems.diffusion_problem,
    floor_bytes=diffusion_cases.diffusion_floor_bytes,
    flops=diffusion_cases.diffusion_flops,
    own=diffusion_providers.own_diffusion,
    plain=diffusion_providers.eager_diffusion,
    providers=diffusion_providers.DIFFUSION_PROVIDERS,
    plan=diffusion_plans.plan_problem,
    step=diffusion_plans.problem_step,
    metered_bytes=diffusion_metering.metered_bytes,
    describe=diffusion_plans.describe_problem,
    candidates=diffusion_config.candidates,
    heuristic=diffusion_config.heuristic,
    complaints=diffusion_providers.complaints,
)

CONVOLUTION = Family(
    name="convolution",
    suite="conv",
    shapes=convolution_cases.CONVOLUTION_SHAPES,
    layouts=convolution_cases.LAYOUTS,
    list_cases=convolution_cases.convolution_cases,
    problem=convolution_problems.convolution_problem,
    floor_bytes=convolution_cases.convolution_floor_bytes,
    flops=convolution_cases.convolution_flops,
    own=conv3x3,
    plain=convolution_providers.eager_convolution,
    providers=convolution_providers.CONVOLUTION_PROVIDERS,
)

TRITON_FAMILIES = {family.name: family for family in (GROUP_NORM, ATTENTION, DIFFUSION)}
SUITES: dict[str, Family] = {family.suite: family for family in (*TRITON_FAMILIES.values(), CONVOLUTION)}
LOOPS = "sampling"
"""The suite of whole sampling loops, which are no family: benchmarks/diffusion/loop.py."""


def shape_sets_of(families: Collection[Family]) -> tuple[str, ...]:
    """Name the shape sets that some of these families have."""
    return tuple(dict.fromkeys(name for family in families for name in family.shapes))


def layouts_of(families: Collection[Family]) -> tuple[str, ...]:
    """Name the layouts that some of these families have."""
    return tuple(dict.fromkeys(name for family in families for name in family.layouts))


def choose_cases(
    families: Sequence[Family], shape_sets: Sequence[str] | None, layouts: Sequence[str] | None, dtype: str, *,
    usual: Sequence[str], timed: bool = False, on_cpu: bool = False,
) -> dict[str, list[Any]]:  # fmt: skip
    """List the cases of each family by its name.

    Args:
        shape_sets, layouts: what was asked for; None for the usual sets, and for every layout.
        usual: shape sets, of each family those that it has.
        timed: list what `run` times.

    Raises:
        ValueError: what was asked for is of none of these families, or there is no case of it.
    """
    names = " or ".join(family.name for family in families)
    sets_there, layouts_there = shape_sets_of(families), layouts_of(families)
    for kind, asked, there in (("shape set", shape_sets, sets_there), ("layout", layouts, layouts_there)):
        for name in asked or ():
            if name not in there:
                raise ValueError(f"{name} is no {kind} of {names}, which has {', '.join(there)}")
    chosen = {
        family.name: family.cases(shape_sets or usual, layouts or layouts_there, dtype, timed=timed, on_cpu=on_cpu)
        for family in families
    }
    if not any(chosen.values()):
        asked = f"{', '.join(shape_sets or usual)} in {', '.join(layouts or layouts_there)}"
        raise ValueError(f"{names} has no case of {asked}")
    return chosen
