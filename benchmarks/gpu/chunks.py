"""One piece of work in a process of its own, which ends in time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkout import ROOT

_HEARD_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a chunk ended."""

    code: int
    """The process's exit code, negative for a signal's."""
    was_cut: bool
    """Whether its time was up."""
    seconds: float


def run_chunk(
    command: Sequence[str], *, environment: Mapping[str, str], seconds: float, grace_s: float, held: Sequence[int] = ()
) -> Ended:
    """Run a command for so long at most, its output going where this process's goes.

    It is interrupted when only the grace is left, as by Ctrl-C, and killed with all it has started when that is over.

    Args:
        held: files that are open as long as the command runs, should it outlive this process.

    Raises:
        KeyboardInterrupt: this process was interrupted; the command is gone then too.
    """
    begun = time.monotonic()
    process = subprocess.Popen(command, env=dict(environment), cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=held)
    try:
        code, was_cut = _wait(process, seconds - grace_s), False
        if code is None:
            was_cut = True
            code = _end(process, begun + seconds - time.monotonic())
    except KeyboardInterrupt:
        _wait(process, _HEARD_S)  # Ctrl-C on a terminal reaches it as well
        _end(process, grace_s)
        raise
    finally:
        process.kill()
        process.wait()
    return Ended(code=code, was_cut=was_cut, seconds=time.monotonic() - begun)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C, and let processes have SIGINT back where a shell in the background ignores it."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in before:
        signal.signal(each, signal.default_int_handler)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _end(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Interrupt, then kill what is left of it and of all it has started."""
    if process.poll() is None:
        started = _started_by(process.pid)
        process.send_signal(signal.SIGINT)
        if _wait(process, seconds) is None:
            started = _started_by(process.pid)
            process.kill()
        for pid in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def _started_by(pid: int) -> set[int]:
    """List the processes that one has started, and those that they have."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has gone
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found
