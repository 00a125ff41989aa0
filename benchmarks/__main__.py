"""The command `python -m benchmarks`: parses its arguments and runs one part of the suite."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

DESCRIPTION = "Measure the kernels: what they move, what they compile to, how long they take."
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 where a row is invalid or failed, or a kernel does not compile; 2 for wrong input; 130 after Ctrl-C; 141
        where what reads the output has gone.
    """
    options = _parser().parse_args(arguments)
    try:
        try:
            return options.command(options)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(" ".join(f"python -m benchmarks: {error}".splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m benchmarks: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks", description=DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Parser)

    from benchmarks.cases import CPU_SETS, DTYPES, MEASURED_SETS, MODES
    from benchmarks.families import FAMILIES, LAYOUTS, LOOPS, SHAPE_SETS, SUITES

    def command(name: str, function: Callable[[Any], int], text: str, sets: Sequence[str]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=function)
        shapes, layouts = (
            "; ".join(f"{family.name} has {', '.join(getattr(family, kind))}" for family in FAMILIES.values())
            for kind in ("shapes", "layouts")
        )
        added.add_argument(
            "--cases", type=_names("shape set", SHAPE_SETS), metavar="SETS",
            help=f"shape sets with commas between: {shapes}; {','.join(sets)} if not given",
        )  # fmt: skip
        added.add_argument("--layouts", type=_names("layout", LAYOUTS), metavar="LAYOUTS",
                           help=f"{layouts}; all if not given")  # fmt: skip
        return added

    traffic = command(
        "traffic", _traffic,
        "Print the bytes that each kernel moves over the least it could, metered in Triton's interpreter, and what it "
        "compiles to; needs no GPU.", MEASURED_SETS,
    )  # fmt: skip
    traffic.add_argument("--family", type=_names("family", FAMILIES), default=tuple(FAMILIES), metavar="FAMILIES",
                         help=f"of {', '.join(FAMILIES)}; all if not given")  # fmt: skip
    traffic.add_argument("--modes", type=_names("mode", ("fwd", "bwd")), default=("fwd", "bwd"), metavar="MODES",
                         help="of fwd, bwd; both if not given")  # fmt: skip
    traffic.add_argument("--dtype", choices=tuple(DTYPES), default="bf16",
                         help="the activations'; %(default)s if not given")  # fmt: skip
    traffic.add_argument("--arch", type=_names("architecture", ARCHITECTURES), default=("sm_90",), metavar="ARCHS",
                         help=f"of {', '.join(ARCHITECTURES)}; sm_90 if not given")  # fmt: skip
    traffic.add_argument("--no-compile", action="store_true", help="meter the bytes, and compile nothing")
    traffic.add_argument("--json", type=Path, metavar="PATH", help="write a list of rows there")

    run = command("run", _run, "Time a suite: every provider, checked first, in turn with the others.", CPU_SETS)
    run.add_argument("--suite", choices=(*SUITES, LOOPS), default="norm",
                     help="norm: modulated group norm; attention; diffusion: noising and loss, sampler steps; "
                          "sampling: whole loops, graphed and not; "
                          "%(default)s if not given")  # fmt: skip
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                     help="%(default)s if not given; on a CPU batches are cut down")  # fmt: skip
    run.add_argument("--modes", type=_names("mode", MODES), default=MODES, metavar="MODES",
                     help=f"of {', '.join(MODES)}; all if not given; bwd repeats one graph's backward")  # fmt: skip
    run.add_argument("--dtype", choices=tuple(DTYPES),
                     help="the activations'; fp32 on a CPU, bf16 on a GPU if not given")  # fmt: skip
    run.add_argument("--quick", action="store_true", help="few repetitions: to see that it works, not how fast")
    run.add_argument("--json", type=Path, metavar="PATH", help="append one JSON object a line there, as rows come in")
    run.add_argument("--profile", type=Path, metavar="FOLDER",
                     help="also write a profiler trace (Chrome JSON) of three calls by each provider there, taken "
                          "after a case's times, with kernel calls as NVTX ranges")  # fmt: skip

    tune = command("tune", _tune, "Time the candidates for each launch config on this GPU and keep the fastest in the "
                   "package's table.", MEASURED_SETS)  # fmt: skip
    tune.add_argument("--family", choices=tuple(FAMILIES), default="group_norm",
                      help="of kernels; %(default)s if not given")  # fmt: skip
    tune.add_argument("--dtype", choices=tuple(DTYPES), default="bf16",
                      help="the activations'; %(default)s if not given")  # fmt: skip
    return parser


def _names(kind: str, accepted: Sequence[str] | dict[str, Any]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of names with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in accepted:
                raise argparse.ArgumentTypeError(f"{name!r} is no {kind}; accepted are {', '.join(accepted)}")
        return names

    return parse


def _check_writable(path: Path | None) -> None:
    """Find out before minutes of work whether their results can be kept."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--json is {path}, a folder; it must be a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--json is {path}, which cannot be written")


def _traffic(options: argparse.Namespace) -> int:
    # Triton reads it when it is first imported; what is compiled here is compiled in another process.
    os.environ["TRITON_INTERPRET"] = "1"
    _check_writable(options.json)
    from benchmarks import tables
    from benchmarks.cases import MEASURED_SETS
    from benchmarks.families import FAMILIES, choose_cases
    from benchmarks.traffic import traffic_rows, traffic_table
    from soda_engine.records import write_json
    from tests.harness.compilation import CompileError

    families = [FAMILIES[name] for name in options.family]
    chosen = choose_cases(families, options.cases, options.layouts, options.dtype, usual=MEASURED_SETS)
    cases = [(FAMILIES[name], case) for name, cases in chosen.items() for case in cases]
    rows = []
    try:
        for row in traffic_rows(cases, options.modes, () if options.no_compile else options.arch):
            rows.append(row)
    except CompileError as error:
        print(" ".join(f"python -m benchmarks: {error}".splitlines()), file=sys.stderr)
        return 1
    finally:
        tables.end_progress()
    print(traffic_table(rows))
    if options.json is not None:
        write_json(options.json, rows)
    return 0


def _run(options: argparse.Namespace) -> int:
    _check_writable(options.json)
    import torch

    from benchmarks import tables
    from benchmarks.cases import CPU_SETS
    from benchmarks.families import LOOPS, SUITES, choose_cases
    from benchmarks.records import append_row
    from benchmarks.suite import PACES, case_modes, suite_rows
    from benchmarks.summary import summarize_rows

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and PyTorch finds no CUDA device")
    device = torch.device(options.device)
    on_cpu = device.type == "cpu"
    dtype = options.dtype or ("fp32" if on_cpu else "bf16")
    if options.suite == LOOPS:
        return _run_loops(options, device, dtype)
    family = SUITES[options.suite]
    chosen = choose_cases([family], options.cases, options.layouts, dtype, usual=CPU_SETS, timed=True, on_cpu=on_cpu)
    (cases,) = chosen.values()
    parts = [(case, mode) for case in cases for mode in case_modes(case, options.modes)]
    rows: list[dict[str, Any]] = []
    pace = PACES["quick" if options.quick else "full"]
    measured = suite_rows(family, cases, options.modes, device, pace, traces=options.profile)
    try:
        for index, (case, mode) in enumerate(parts):
            tables.show_progress(f"{index + 1}/{len(parts)} {case.id} {case.layout} {mode}")
            new = next(measured)
            for row in new if options.json is not None else ():
                append_row(options.json, row)
            rows += new
    finally:
        tables.end_progress()
    print(summarize_rows(rows))
    return 1 if any(row["status"] in ("invalid", "failed") for row in rows) else 0


def _run_loops(options: argparse.Namespace, device: Any, dtype: str) -> int:
    from benchmarks.diffusion.loop import loop_cases, loop_rows, loop_table
    from benchmarks.records import append_row
    from benchmarks.suite import PACES

    if options.layouts is not None:
        raise ValueError(f"--layouts is {','.join(options.layouts)}; the suite {options.suite} has none")
    if options.profile is not None:
        raise ValueError(f"--profile is {options.profile}; the suite {options.suite} takes no traces")
    pace, rows = PACES["quick" if options.quick else "full"], []
    cases = loop_cases(options.cases, device)
    for new in loop_rows(cases, device, dtype, budget_s=pace.budget_s, min_rounds=pace.min_rounds):
        for row in new if options.json is not None else ():
            append_row(options.json, row)
        rows += new
    print(loop_table(rows))
    return 1 if any(row["status"] == "invalid" for row in rows) else 0


def _tune(options: argparse.Namespace) -> int:
    import torch

    from benchmarks.cases import MEASURED_SETS
    from benchmarks.families import FAMILIES, choose_cases
    from benchmarks.tune import tune_family

    family = FAMILIES[options.family]
    chosen = choose_cases([family], options.cases, options.layouts, options.dtype, usual=MEASURED_SETS)
    (cases,) = chosen.values()
    if not torch.cuda.is_available():
        raise ValueError("tune times kernels on a GPU, and PyTorch finds no CUDA device")
    for line in tune_family(family, cases, torch.device("cuda")):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
