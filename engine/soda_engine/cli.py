"""The command `soda-engine`: parses its arguments, runs one command, and turns an error into one clear line."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; sys.argv's if None.

    Returns:
        0; 1 where a package is missing or training cannot go on; 2 for wrong input; 130 after Ctrl-C.
    """
    try:
        import tyro

        from soda_engine.command_line import COMMANDS, DESCRIPTION
        from soda_engine.train.trainer import TrainingStopped
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("soda_"):
            raise
        return _fail(f"soda-engine needs {error.name}: pip install 'soda-engine[engine]'", 1)
    command = tyro.cli(
        COMMANDS, prog="soda-engine", description=DESCRIPTION, args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs),
    )  # fmt: skip
    try:
        command()
    except (ValueError, TypeError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        return _fail(f"soda-engine: {error}", 2)
    except TrainingStopped as error:
        return _fail(f"soda-engine: {error}", 1)
    except KeyboardInterrupt:
        return _fail("soda-engine: interrupted", 130)
    return 0


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
