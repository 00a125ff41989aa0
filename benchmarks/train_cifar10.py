"""Real training as a benchmark: SODA on CIFAR-10 under a wall-clock budget, and how good z is as time goes by.

The reference path is the same model written in PyTorch alone, eager, in the same trainer. Training and evaluation have
a clock each, and the budget is of training. The same command again goes on where it was, after Ctrl-C, SIGTERM or the
loss of the machine; with a larger budget it goes on from the end.

OUT holds PATH.jsonl, one object a line and evaluation; accuracy.png; and PATH/, a run of `soda-engine train`, which
`soda-engine probe` and the other commands take.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # called by its path, which makes this folder the first to be searched
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.commands.arguments import Parser

PATHS = ("ours", "reference")
PRESETS = {"cuda": "cifar10-light", "cpu": "cifar10-small"}
EVERY_MINUTES = {"cuda": 1.0, "cpu": 2.5}
PROBE_IMAGES = {"cuda": 50_000, "cpu": 10_000}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 where every path's budget is used up; 1 where training could not go on; 2 for wrong input; 130 where the user
        interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on", 130)


def _parser() -> Parser:
    parser = Parser(prog="train_cifar10", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR",
                        help="folder with train.parquet and test.parquet, or what else `soda-engine train --data` "
                             "takes; the preset's data set of the Hugging Face hub if not given")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/train_cifar10"), metavar="DIR",
                        help="where everything goes; %(default)s if not given")  # fmt: skip
    parser.add_argument("--path", choices=(*PATHS, "both"), default="both",
                        help="this engine, the reference, or both in turn, an evaluation each (the default), so that a "
                             "machine with other work slows both")  # fmt: skip
    parser.add_argument("--preset", metavar="NAME",
                        help=f"of soda-engine; {PRESETS['cuda']} on a GPU and {PRESETS['cpu']} on a CPU if not "
                             "given")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda")
    parser.add_argument("--budget-minutes", type=float, default=10.0, metavar="M",
                        help="of training, for each path; %(default)g if not given")  # fmt: skip
    parser.add_argument("--eval-every-minutes", type=float, metavar="M",
                        help="of training; 1 on a GPU and 2.5 on a CPU if not given")  # fmt: skip
    parser.add_argument("--max-images", type=int, metavar="N", help="stop training after so many, counted with "
                        "repetition; the preset's length if not given")  # fmt: skip
    parser.add_argument("--probe-images", type=int, metavar="N",
                        help="of train and of test, at most, that an evaluation reads; all on a GPU and 10,000 of each "
                             "on a CPU if not given")  # fmt: skip
    parser.add_argument("--probe-epochs", type=int, default=50, metavar="N",
                        help="of the linear probe; %(default)s if not given")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="key of every random draw; %(default)s if not given")
    parser.add_argument("--draw", type=Path, nargs="+", metavar="JSONL",
                        help="only draw what these files hold into OUT/accuracy.png, such as those of two "
                             "runs")  # fmt: skip
    return parser


def _run(options: argparse.Namespace) -> int:
    for name in ("budget_minutes", "eval_every_minutes", "max_images", "probe_images", "probe_epochs"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}; it must be above 0")
    from benchmarks.resuming import read_lines

    if options.draw:
        return _show([row for file in options.draw for row in read_lines(file)], options.out)
    from benchmarks.training.budget import Budget, Pretraining, budget_config
    from soda_engine.presets import PRESETS as KNOWN
    from soda_engine.train.distributed import resolve_device
    from soda_engine.train.trainer import TrainingStopped

    device = resolve_device(options.device)
    kind = device.type
    preset = options.preset or PRESETS[kind]
    if preset not in KNOWN:
        raise ValueError(f"--preset is {preset!r}; accepted are {', '.join(KNOWN)}")
    budget = Budget(
        minutes=options.budget_minutes,
        every_minutes=min(options.eval_every_minutes or EVERY_MINUTES[kind], options.budget_minutes),
        probe_images=options.probe_images or PROBE_IMAGES[kind], probe_epochs=options.probe_epochs,
    )  # fmt: skip
    runs = []
    for path in PATHS if options.path == "both" else (options.path,):
        config = budget_config(
            preset, budget, data=options.data, out=options.out / path, device=str(device), seed=options.seed,
            max_images=options.max_images,
        )  # fmt: skip
        runs.append(Pretraining(path, preset, config, budget, options.out / f"{path}.jsonl"))
    try:
        while not all(run.finished for run in runs):
            for run in runs:
                if not run.finished and not run.advance():
                    return _fail("interrupted; the same command goes on", 130)
    except TrainingStopped as error:
        return _fail(str(error), 1)
    finally:
        rows = [row for path in PATHS for row in read_lines(options.out / f"{path}.jsonl")]
        if rows:
            _show(rows, options.out)
    return 0


def _show(rows: list[dict[str, Any]], out: Path) -> int:
    """Print the evaluations, and draw them."""
    from benchmarks.training.budget_pictures import budget_table, draw_budget

    if not rows:
        raise ValueError("there is no evaluation to draw")
    print(budget_table(rows))
    print(draw_budget(rows, out / "accuracy.png"))
    return 0


def _fail(message: str, code: int) -> int:
    print(" ".join(f"train_cifar10: {message}".splitlines()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
