"""The stored traffic is of the kernels as they are, and a row of several kernels tells of the worst."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.cases import MEASURED_SETS
from benchmarks.families import TRITON_FAMILIES, TritonFamily
from benchmarks.records import describe_config
from benchmarks.suite import case_modes
from benchmarks.traffic import _worst
from tests.packaging.source_tree import ROOT

FILES = sorted((ROOT / "benchmarks/results").glob("*/*-traffic*.json"), key=lambda path: path.name, reverse=True)


def stored_rows(ops: set[str]) -> list[dict[str, Any]]:
    """The rows of the newest file that has some of these ops."""
    for path in FILES:
        rows = [row for row in json.loads(path.read_text()) if row["op"] in ops]
        if rows:
            return rows
    raise AssertionError(f"no traffic of {ops} is stored")


@pytest.mark.parametrize("family", TRITON_FAMILIES.values(), ids=lambda family: family.name)
def test_the_stored_traffic_is_of_the_configs_that_run(family: TritonFamily) -> None:
    cases = {(case.id, case.layout): case for case in family.cases(MEASURED_SETS, family.layouts, "bf16")}
    rows = stored_rows({case.op for case in cases.values()})
    assert len(rows) == sum(len(case_modes(case, ("fwd", "bwd"))) for case in cases.values())
    for row in rows:
        case = cases[row["case"], row["layout"]]
        plan = family.plan(family.problem(case, "meta"), row["mode"])
        assert row["config"] == describe_config(plan.config)[1], (row["case"], row["layout"], row["mode"])


def kernel(*, on_images: bool, programs: int = 8, **compiled: Any) -> dict[str, Any]:
    usual = {"registers": 64, "shared_bytes": 0, "spills": 0, "local_bytes": 0, "max_vector_bytes": 16, "hgmma": True,
             "occupancy": 0.5}  # fmt: skip
    return {"on_images": on_images, "programs": programs, "arch": {"sm_90": usual | compiled}}


def test_a_row_has_the_worst_of_its_kernels() -> None:
    small = kernel(on_images=False, programs=1, registers=200, spills=3, hgmma=False, max_vector_bytes=4, occupancy=0.1)
    good = kernel(on_images=True)
    assert _worst([good, small], "sm_90") == {
        "registers": 200, "shared_bytes": 0, "spills": 3, "local_bytes": 0, "max_vector_bytes": 16, "hgmma": True,
        "programs": 8, "occupancy": 0.5,
    }  # fmt: skip
    bad = kernel(on_images=True, programs=4, hgmma=False, max_vector_bytes=8, occupancy=0.25)
    worst = _worst([good, bad], "sm_90")
    assert (worst["programs"], worst["hgmma"], worst["max_vector_bytes"], worst["occupancy"]) == (4, False, 8, 0.25)
