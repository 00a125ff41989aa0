"""The command `python -m soda_kernels.integrations.hub`: writes the package for Hugging Face's `kernels`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from soda_kernels.integrations.hub.package import write_package


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 where the folder cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m soda_kernels.integrations.hub",
        description="Write the kernels as a repository that kernels.get_local_kernel loads and kernelize takes layers "
        "from: sources alone, which import nothing of soda_kernels.",
    )
    parser.add_argument("--out", type=Path, default=Path("dist/hub"), help="the folder to write to (dist/hub)")
    out = parser.parse_args(arguments).out
    try:
        variants = write_package(out)
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for variant in variants:
        print(f"wrote {variant}")
    print(f'load it with kernels.get_local_kernel(Path("{out}"))')
    return 0


if __name__ == "__main__":
    sys.exit(main())
