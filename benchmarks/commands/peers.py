"""The command `peers`."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import tables
from benchmarks.commands.arguments import add_command, result_file


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands, "peers", run,
        "Models of diffusers with the kernels in them against the same models without: launches and bytes of Stable "
        "Diffusion's U-Net as on a GPU, and times of a small U-Net's training step on this CPU.",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=90.0, metavar="S",
                        help="for all timed steps together, 0 to count alone; %(default)g if not given")  # fmt: skip
    parser.add_argument("--batch", type=int, default=4, metavar="N",
                        help="images of a timed step; %(default)s if not given")  # fmt: skip
    parser.add_argument("--no-count", action="store_true", help="only time")
    parser.add_argument("--json", type=result_file, metavar="PATH", help="write both tables' rows there")


def run(options: argparse.Namespace) -> int:
    """Count, time and print."""
    if options.batch < 1:
        raise ValueError(f"--batch is {options.batch}; it must be positive")
    if options.seconds < 0:
        raise ValueError(f"--seconds is {options.seconds}; it must not be negative")
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"peers needs diffusers, which cannot be imported ({error}): pip install diffusers") from None
    import torch

    from benchmarks.peers import counting, training
    from benchmarks.records import describe_environment
    from soda_engine.records import write_json

    found: dict[str, Any] = {"diffusers": diffusers.__version__}
    if not options.no_count:
        found["kernels"] = counting.kernel_rows(tables.show_progress)
        tables.end_progress()
        print("Stable Diffusion 1.5's U-Net, bf16, as it would launch on a GPU (counted, not measured)")
        print(counting.kernel_table(found["kernels"]))
    if options.seconds:
        found["training"] = training.training_rows(options.batch, options.seconds, tables.show_progress)
        tables.end_progress()
        threads = torch.get_num_threads()
        print(f"\nUNet2DModel for 32x32 images, batch {options.batch}, fp32, this CPU with {threads} threads")
        print(training.training_table(found["training"]))
    if options.json is not None:
        write_json(options.json, found | {"env": describe_environment(torch.device("cpu"))})
    return 0
