"""The noising, losses and sampler steps that are measured, as data, and what no kernel can do without."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.cases import DTYPES, MODES, ShapeSet, cut_down

LAYOUTS = ("nchw", "nhwc")


class ImageShape(NamedTuple):
    """A batch of images or latents."""

    batch: int
    channels: int
    height: int
    width: int


DIFFUSION_SHAPES = {
    "cifar": ShapeSet(128, (ImageShape(128, 3, 32, 32),)),
    "soda-64": ShapeSet(64, (ImageShape(64, 3, 64, 64),)),
    "soda-128": ShapeSet(16, (ImageShape(16, 3, 128, 128),)),
    "adm-256": ShapeSet(8, (ImageShape(8, 3, 256, 256),)),
    "sd15": ShapeSet(32, (ImageShape(32, 4, 64, 64), ImageShape(1, 4, 64, 64))),
    "odd": ShapeSet(512, (
        ImageShape(   4, 3, 33, 47),
        ImageShape(   5, 1,  7,  9),
        ImageShape(   1, 3,  1,  1),
        ImageShape(4096, 3,  4,  4),
    )),
    # For rehearsals of the suite itself.
    "tiny": ShapeSet(2, (ImageShape(2, 3, 8, 8),)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Call:
    """One way in which an op is called."""

    op: str
    name: str
    modes: tuple[str, ...] = ("fwd",)
    target: str = "eps"
    bytes_x0: bool = False
    """Whether x0 comes as uint8."""
    sampling: str | None = None
    """How the step index is drawn, or None where it is given."""
    saves: bool = False
    """Whether the loss writes its gradient, which the backward scales; else the backward computes it again."""
    method: str = "ddim"
    eta: float = 0.0
    guided: bool = False
    rescale: float = 0.0
    clip_x0: float | None = None

    @property
    def second_order(self) -> bool:
        """Whether the step has an x0 from the step before it."""
        return self.method == "dpmpp_2m"

    @property
    def draws(self) -> bool:
        """Whether what it returns depends on noise."""
        if self.op == "sampler_step":
            return self.method == "ddpm" or self.eta > 0.0
        return self.op != "denoising_loss" or self.target != "x0"


def _loss(name: str, **options: Any) -> Call:
    return Call(op="denoising_loss", name=name, modes=("fwd", "bwd"), **options)


def _step(name: str, method: str, **options: Any) -> Call:
    return Call(op="sampler_step", name=name, method=method, **options)


METERED_CALLS = (
    Call(op="philox_normal", name="normals"),
    Call(op="add_noise", name="given"),
    Call(op="add_noise", name="given-u8", bytes_x0=True),
    Call(op="add_noise", name="drawn", sampling="uniform"),
    Call(op="add_noise", name="drawn-u8", sampling="uniform", bytes_x0=True),
    Call(op="add_noise", name="stratified", sampling="stratified"),
    Call(op="add_noise", name="logit-normal", sampling="logit_normal"),
    _loss("eps"),
    _loss("v", target="v"),
    _loss("x0", target="x0"),
    _loss("v-u8", target="v", bytes_x0=True),
    _loss("eps-saved", saves=True),
    _loss("v-saved", target="v", saves=True),
    _loss("x0-saved", target="x0", saves=True),
    _step("ddim", "ddim"),
    _step("ddim-guided-clip", "ddim", guided=True, clip_x0=1.0),
    _step("ddim-guided-rescale", "ddim", guided=True, rescale=0.7),
    _step("ddim-eta", "ddim", eta=0.5),
    _step("ddpm", "ddpm"),
    _step("ddpm-guided-rescale-clip", "ddpm", guided=True, rescale=0.7, clip_x0=1.0),
    _step("dpmpp", "dpmpp_2m"),
    _step("dpmpp-guided-clip", "dpmpp_2m", guided=True, clip_x0=1.0),
)
"""What `traffic` counts and `tune` tunes: each op alone."""

TIMED_CALLS = (
    Call(op="noising_and_loss", name="eps", modes=MODES),
    Call(op="noising_and_loss", name="v", modes=MODES, target="v"),
    _step("ddim-guided-clip", "ddim", guided=True, clip_x0=1.0),
    _step("ddpm-guided-clip", "ddpm", guided=True, clip_x0=1.0),
    _step("dpmpp-guided-clip", "dpmpp_2m", guided=True, clip_x0=1.0),
)
"""What `run` times: what a training step does around the denoiser, and what a sampler does between two calls of it."""


@dataclass(frozen=True, kw_only=True)
class DiffusionCase:
    """One call on one shape in one layout and dtype."""

    shape_set: str
    shape: ImageShape
    call: Call
    layout: str
    dtype: str

    @property
    def op(self) -> str:
        """As rows of results call it."""
        return self.call.op

    @property
    def modes(self) -> tuple[str, ...]:
        """Those that it has."""
        return self.call.modes

    @property
    def id(self) -> str:
        """The shape and the call in words: `soda-64/64x3@64x64 v-saved`."""
        shape = self.shape
        return f"{self.shape_set}/{shape.batch}x{shape.channels}@{shape.height}x{shape.width} {self.call.name}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of images, but for an x0 of bytes."""
        return DTYPES[self.dtype]

    @property
    def sample_elements(self) -> int:
        """Elements of one image."""
        return self.shape.channels * self.shape.height * self.shape.width

    @property
    def image_elements(self) -> int:
        """Elements of a batch: tensors on which the width of accesses matters have as many."""
        return self.shape.batch * self.sample_elements

    def with_batch(self, batch: int) -> DiffusionCase:
        """The same case with another number of samples."""
        return dataclasses.replace(self, shape=self.shape._replace(batch=batch))

    def to_dict(self) -> dict[str, Any]:
        """What identifies the case in a row of results."""
        shape, call = self.shape, self.call
        return {
            "set": self.shape_set, "id": self.id, "N": shape.batch, "C": shape.channels, "H": shape.height,
            "W": shape.width, "layout": self.layout, "dtype": self.dtype, "call": dataclasses.asdict(call),
        }  # fmt: skip


def diffusion_cases(
    shape_sets: Sequence[str], layouts: Sequence[str], dtype: str, *, on_cpu: bool = False,
    calls: Sequence[Call] = METERED_CALLS,
) -> list[DiffusionCase]:  # fmt: skip
    """List the cases of some shape sets, with batches cut down for a CPU if asked; a layout's cases stay together."""
    cases = [
        DiffusionCase(shape_set=name, shape=shape, call=call, layout=layout, dtype=dtype)
        for layout in layouts
        for call in calls
        for name in shape_sets
        for shape in DIFFUSION_SHAPES[name].shapes
        if call.op != "philox_normal" or layout == "nchw"  # it knows of no layout
    ]
    return cut_down(cases, DIFFUSION_SHAPES) if on_cpu else cases


timed_cases = functools.partial(diffusion_cases, calls=TIMED_CALLS)
"""What `run` times, instead of every op alone."""

_INTEGER = torch.int64.itemsize
_FLOAT = torch.float32.itemsize


def diffusion_floor_bytes(case: DiffusionCase, mode: str) -> int:
    """Count the bytes that no kernel can do without: each input read once, each output written once; noise never.

    Of tables, of a schedule or of weights, one entry a sample and none of a sampler's. noising_and_loss is the sum of
    its two ops, between which a denoiser has x_t.

    Args:
        mode: "fwd", "bwd" or "fwd+bwd", which is the sum.
    """
    if mode == "fwd+bwd":
        return diffusion_floor_bytes(case, "fwd") + diffusion_floor_bytes(case, "bwd")
    call, batch = case.call, case.shape.batch
    if call.op == "noising_and_loss":
        parts = ("add_noise", "denoising_loss") if mode == "fwd" else ("denoising_loss",)
        return sum(
            diffusion_floor_bytes(dataclasses.replace(case, call=dataclasses.replace(call, op=part)), mode)
            for part in parts
        )
    image = case.image_elements * case.torch_dtype.itemsize
    x0 = case.image_elements if call.bytes_x0 else image
    key = 2 * _INTEGER + batch * _INTEGER
    if call.op == "philox_normal":
        return image + key
    if call.op == "sampler_step":
        read = 2 + call.guided + call.second_order
        return (read + 2) * image + (key if call.draws else 0)
    index, entry = batch * _INTEGER, batch * _FLOAT
    if call.op == "add_noise":
        return x0 + image + key + index + 2 * entry
    if mode == "bwd" and call.saves:
        return 2 * image + entry  # the gradient and dloss; dprediction
    of_target = {"eps": key, "x0": x0, "v": x0 + key + 2 * entry}[call.target]
    written = image if mode == "bwd" or call.saves else 0
    # The weight and its index; the loss or dloss.
    return image + of_target + index + 2 * entry + written


# Operations an element. A normal costs about 50: ten rounds of four multiplications and four xors for each four, a
# logarithm, a root, a sine and a cosine for each two. The rest is the formulas'.
_NOISE_FLOPS = 50
_FORMULA_FLOPS = {"philox_normal": 0, "add_noise": 3, "denoising_loss": 5, "noising_and_loss": 8, "sampler_step": 12}


def diffusion_flops(case: DiffusionCase, mode: str) -> int:
    """Estimate the operations of a call."""
    draws = {"noising_and_loss": 2}.get(case.op, 1) if case.call.draws else 0
    if mode == "bwd":
        return case.image_elements * (1 if case.call.saves else _NOISE_FLOPS * min(draws, 1) + 5)
    forward = case.image_elements * (_NOISE_FLOPS * draws + _FORMULA_FLOPS[case.op])
    return forward + (diffusion_flops(case, "bwd") if mode == "fwd+bwd" else 0)
