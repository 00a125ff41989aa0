"""What a call costs that has next to nothing to compute: this package's functions beside PyTorch's, on this CPU.

    python -m benchmarks.small_calls --json PATH

Inputs have 2 to 8 KiB, so that the time is that of Python, of the dispatcher, and of autograd where it records. The
group norm of PyTorch computes less: neither modulations nor SiLU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import timers
from benchmarks.commands.arguments import Parser, result_file
from benchmarks.records import describe_environment
from benchmarks.tables import table
from soda_engine.records import write_json
from soda_kernels import ModulatedGroupNorm, attention_qkvpacked, conv3x3, modulated_group_norm

GROUP_NORM, WANTED = "F.group_norm", 2.5
"""How many times as long as PyTorch's function ours may take, where autograd does not record."""


@dataclass(frozen=True)
class SmallCall:
    """A call of this package's and the one of PyTorch's that it is held against."""

    name: str
    beside: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


def small_calls(*, recorded: bool) -> list[SmallCall]:
    """Return the calls, on seeded tensors.

    Args:
        recorded: whether autograd records them for a backward.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small, image, filters, qkv, scale, shift = (
            torch.randn(shape).requires_grad_(recorded)
            for shape in ((1, 32, 4, 4), (1, 32, 8, 8), (32, 32, 3, 3), (1, 16, 3, 2, 16), (1, 32), (1, 32))
        )
    image, filters = _channels_last(image), _channels_last(filters)
    norm, plain_norm = (kind(8, 32).requires_grad_(recorded) for kind in (ModulatedGroupNorm, nn.GroupNorm))
    affine, twice = (8, norm.weight, norm.bias), ((scale, shift), (scale, shift))
    calls = []
    for layout, x in (("nchw", small), ("nhwc", _channels_last(small))):
        plain = partial(F.group_norm, x, *affine)
        calls += [
            (f"modulated_group_norm, {layout}", GROUP_NORM, partial(modulated_group_norm, x, *affine), plain),
            (f"modulated_group_norm, two modulations, {layout}", GROUP_NORM,
             partial(modulated_group_norm, x, *affine, twice), plain),
            (f"ModulatedGroupNorm, {layout}", "nn.GroupNorm", partial(norm, x), partial(plain_norm, x)),
        ]  # fmt: skip

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in qkv.unbind(2)))

    calls += [
        ("conv3x3, nhwc", "F.conv2d", partial(conv3x3, image, filters), partial(F.conv2d, image, filters, padding=1)),
        ("attention_qkvpacked", "F.scaled_dot_product_attention", partial(attention_qkvpacked, qkv), attend),
    ]
    return [SmallCall(*call) for call in calls]


def _channels_last(image: Tensor) -> Tensor:
    return image.detach().to(memory_format=torch.channels_last).requires_grad_(image.requires_grad)


def rows(seconds: float) -> list[dict[str, Any]]:
    """Time every call beside PyTorch's, in turn, without and with autograd recording it.

    Args:
        seconds: for each pair of calls.
    """
    device, found = torch.device("cpu"), []
    for recorded in (False, True):
        for call in small_calls(recorded=recorded):
            steps = {"ours": call.ours, "theirs": call.theirs, "theirs, again": call.theirs}
            with torch.set_grad_enabled(recorded):
                times = timers.wall(steps, device=device, budget_s=seconds, min_rounds=5, warm_up_s=0.2)
            theirs = times["theirs"], times["theirs, again"]
            found.append({
                "call": call.name, "beside": call.beside, "recorded": recorded,
                "us": timers.summarize(times["ours"]), "their_us": timers.summarize(theirs[0]),
                "times_as_long": timers.pair(times["ours"], *theirs), "aa_spread": timers.spread(*theirs),
            })  # fmt: skip
    return found


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.0 <= seconds < 3600.0:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds from 0 up to an hour")
    return seconds


def main() -> None:
    """Print the table, and keep the rows."""
    parser = Parser(description=__doc__.split("\n")[0], prog="python -m benchmarks.small_calls")
    parser.add_argument("--seconds", type=_seconds, default=2.0, help="for each pair of calls")
    parser.add_argument("--json", type=result_file, metavar="PATH", help="write the rows to this file")
    options = parser.parse_args()
    found = rows(options.seconds)
    print(table(
        ("call", "autograd", "us", "beside", "us", "times as long", "A/A"),
        ((r["call"], "records" if r["recorded"] else "-", f"{r['us']['p50']:.1f}", r["beside"],
          f"{r['their_us']['p50']:.1f}", f"{r['times_as_long']['p50']:.2f}x", f"{r['aa_spread']:.1%}") for r in found),
    ))  # fmt: skip
    of_norm = [r for r in found if r["beside"] == GROUP_NORM and not r["recorded"]]
    worst = max(of_norm, key=lambda r: r["times_as_long"]["p50"])
    print(f"Of group norm at most {worst['times_as_long']['p50']:.2f}x ({worst['call']}); wanted: {WANTED}x or less")
    if options.json:
        write_json(options.json, {"rows": found, "env": describe_environment(torch.device("cpu"))})


if __name__ == "__main__":
    main()
