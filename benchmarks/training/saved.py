"""What each block keeps for the backward: this engine, and the same blocks as one writes them in PyTorch.

    python -m benchmarks.training.saved --preset cifar10 --json PATH

Nothing is computed: the forward runs over fake tensors, under bf16 autocast as on a GPU. A tensor whose memory another
tensor already kept takes none of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.attention.providers import eager_attention
from benchmarks.commands.arguments import Parser, result_file
from benchmarks.records import describe_environment
from benchmarks.tables import table
from soda_engine.config import TrainConfig
from soda_engine.models import blocks
from soda_engine.models.soda import Soda
from soda_engine.presets import PRESETS
from soda_engine.records import write_json
from soda_engine.roofline.saved import LiveMemory, SavedTensor, list_saved
from soda_kernels import ModulatedGroupNorm


@dataclass(frozen=True)
class Kept:
    """What one way of writing the model keeps."""

    tensors: list[SavedTensor]
    held_bytes: int
    """Memory that lives after a forward, whoever holds it."""


def saved_by_way(config: TrainConfig, batch_size: int) -> dict[str, Kept]:
    """List what a forward keeps, in bf16; where the config checkpoints, by the engine alone.

    By "engine"; by "copies", the same where autograd keeps what it would by itself, resampled copies among it; by
    "eager", PyTorch's own functions one after another.
    """
    found = {"engine": _saved(config, batch_size)}
    if config.checkpoint_activations != "none":  # which others have not
        return found
    with _copies_kept():
        found["copies"] = _saved(config, batch_size)
        with _eagerly():
            found["eager"] = _saved(config, batch_size)
    return found


def _saved(config: TrainConfig, batch_size: int) -> Kept:
    with torch.device("meta"):
        model: Any = Soda(config.model)
    model.to(memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True):  # the tables of the noise schedule have values
        model.to_empty(device="cpu")
        model.denoiser.checkpoint_activations(config.checkpoint_activations)
        sides = (config.model.encoder.image_size, config.model.denoiser.image_size)
        source, target = (
            torch.empty(batch_size, config.dataset.channels, side, side).to(memory_format=torch.channels_last)
            for side in sides
        )
        ids = torch.empty(batch_size, dtype=torch.int64)

        def run() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                losses: Tensor = model(source, target, seed=0, sample_ids=ids, step=0)
            return losses

        tensors = list_saved(model, run)
        with LiveMemory() as memory:
            losses = run()  # noqa: F841  it holds the graph
            held = memory.num_bytes()
    return Kept(tensors, held)


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Replace what this project wrote for the denoiser by PyTorch's own functions."""

    def norm(
        self: ModulatedGroupNorm, x: Tensor | tuple[Tensor, Tensor], *modulations: tuple[Tensor, Tensor],
        residual: Tensor | None = None, residual_scale: float = 1.0, seed: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        x = torch.cat(x, dim=1) if isinstance(x, tuple) else x
        x = x if residual is None else (x + residual) * residual_scale
        y = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        for scale, shift in modulations:
            y = y * (scale[:, :, None, None] + self.scale_offset) + shift[:, :, None, None]
        y = y if self.activation is None else F.silu(y)
        y = F.dropout(y, self.dropout_p, self.training)
        return y if residual is None else (y, x)

    with (
        patch.object(ModulatedGroupNorm, "forward", norm),
        patch.object(blocks, "attention_qkvpacked", eager_attention),
        patch.object(blocks, "attention", eager_attention),
    ):
        yield


@contextlib.contextmanager
def _copies_kept() -> Iterator[None]:
    with (
        patch.object(blocks, "halved_keeping", lambda kept_anyway, x: blocks.halved(x)),
        patch.object(blocks, "calling", lambda layer, x, again: layer(x)),
    ):
        yield


def block_rows(ways: dict[str, Kept]) -> list[dict[str, Any]]:
    """Add up bytes by block, in the model's order: what each way keeps, and what of it is there already.

    The last rows are the sum over blocks, and all memory that lives after the forward: also small images from which
    copies are made again, and what holds a checkpoint's inputs.
    """
    rows: dict[str, dict[str, Any]] = {}
    for way, kept in ways.items():
        for tensor in kept.tensors:
            row = rows.setdefault(_block(tensor.layer), {"block": _block(tensor.layer)})
            for key, size in ((way, tensor.own_bytes), (f"{way}_shared", tensor.num_bytes - tensor.own_bytes)):
                row[f"{key}_bytes"] = row.get(f"{key}_bytes", 0) + size
    names = [f"{way}{shared}_bytes" for way in ways for shared in ("", "_shared")]
    found = [{"block": row["block"], **{name: row.get(name, 0) for name in names}} for row in rows.values()]
    held = {f"{way}_bytes": kept.held_bytes for way, kept in ways.items()}
    return [
        *found, {"block": "sum", **{name: sum(row[name] for row in found) for name in names}},
        {"block": "all that lives", **{name: held.get(name, 0) for name in names}},
    ]  # fmt: skip


def _block(layer: str) -> str:
    """Return the part of a layer's path that names a block of the encoder or a level of the denoiser."""
    return ".".join(layer.split(".")[:3]) or "noise, masks, loss"


def tensor_table(tensors: Sequence[SavedTensor]) -> str:
    """Write a line for each tensor."""
    return table(
        ("layer", "shape", "dtype", "MiB", "shares with"),
        (
            (t.layer, "x".join(map(str, t.shape)), t.dtype, f"{t.num_bytes / 2**20:.2f}", t.shares_with or "-")
            for t in tensors
        ),
    )


def main() -> None:
    """Print the tables, and keep the rows."""
    parser = Parser(description=__doc__.split("\n")[0], prog="python -m benchmarks.training.saved")
    parser.add_argument("--preset", default="cifar10", choices=sorted(PRESETS), help="%(default)s if not given")
    parser.add_argument("--batch-size", type=int, help="the preset's if not given")
    parser.add_argument("--checkpoint-activations", choices=("none", "norms", "blocks"), default="none",
                        help="as in training; %(default)s if not given")  # fmt: skip
    parser.add_argument("--tensors", action="store_true", help="also list every tensor that the engine keeps")
    parser.add_argument("--json", type=result_file, help="write the rows to this file")
    options = parser.parse_args()
    config = dataclasses.replace(PRESETS[options.preset], checkpoint_activations=options.checkpoint_activations)
    batch_size = options.batch_size or config.batch_size
    ways = saved_by_way(config, batch_size)
    rows = block_rows(ways)
    if options.tensors:
        print(tensor_table(ways["engine"].tensors), end="\n\n")
    print(f"{options.preset}, batch {batch_size}, bf16: MiB kept for the backward, and those that were kept already")
    header = ("block", "engine", "already", "with copies", "already", "eager", "already")
    print(table(
        header[: len(rows[0])],
        ((row["block"], *(f"{row[name] / 2**20:,.1f}" for name in row if name != "block")) for row in rows),
    ))  # fmt: skip
    if options.json:
        write_json(options.json, {
            "preset": options.preset, "batch": batch_size, "checkpoint_activations": options.checkpoint_activations,
            "rows": rows, "env": describe_environment(torch.device("cpu")),
        })  # fmt: skip


if __name__ == "__main__":
    main()
