"""The command `soda-engine`: parses its arguments, runs one command, and turns an error into one clear line."""

from __future__ import annotations

import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; sys.argv's if None.

    Returns:
        0; 1 where a package is missing or training cannot go on; 2 for wrong input; 130 after Ctrl-C; 141 where what
        reads the output has gone.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # a closed pipe is to show here, not while Python shuts down
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest of the output goes
        return 141  # 128 + SIGPIPE: what a shell reports of any command cut short by `head`


def _run(arguments: list[str] | None) -> int:
    try:
        import torch
        import tyro

        from soda_engine.command_line import COMMANDS, DESCRIPTION
        from soda_engine.train.trainer import TrainingStopped
    except ModuleNotFoundError as error:
        return _missing(error)
    command = tyro.cli(
        COMMANDS, prog="soda-engine", description=DESCRIPTION, args=arguments,
        config=(
            tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs,
            tyro.conf.PositionalMetavarFromFieldName,
        ),
    )  # fmt: skip
    try:
        command()
    except ModuleNotFoundError as error:  # some packages are imported by the commands that need them
        return _missing(error)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return _fail(f"soda-engine: {error}", 2)
    except torch.OutOfMemoryError as error:
        return _fail(f"soda-engine: {error} Lower the batch size, or raise --accumulate.", 1)
    except TrainingStopped as error:
        return _fail(f"soda-engine: {error}", 1)
    except RuntimeError as error:
        if not _comes_of_compiling(error):
            raise
        reason = str(error).partition("\n")[0]
        return _fail(f"soda-engine: torch.compile failed: {reason}; leave out --compile", 1)
    except KeyboardInterrupt:
        return _fail("soda-engine: interrupted", 130)
    return 0


def _comes_of_compiling(error: RuntimeError) -> bool:
    """Tell by the modules' names, so that no command imports the compiler."""
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)


def _missing(error: ModuleNotFoundError) -> int:
    if error.name is None or error.name.startswith("soda_"):
        raise error
    return _fail(f"soda-engine needs {error.name.partition('.')[0]}: pip install 'soda-engine[engine]'", 1)


def _fail(message: str, code: int) -> int:
    print(" ".join(message.splitlines()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
