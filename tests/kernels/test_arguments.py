"""Wrong arguments: the right exception, whose message names the argument, what came, and what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import soda_kernels as sk

SCHEDULE = sk.NoiseSchedule.linear(10)
X = torch.randn(3, 8, 4, 5)
SCALE = torch.zeros(3, 8)
TOKENS = torch.randn(2, 5, 3, 4)
META = torch.device("meta")
CPU = torch.device("cpu")


def image_norm(x: Any = X, num_groups: Any = 4, **keywords: Any) -> Any:
    return sk.modulated_group_norm(x, num_groups, **keywords)


def attend(q: Any = TOKENS, k: Any = TOKENS, v: Any = TOKENS, **keywords: Any) -> Any:
    return sk.attention(q, k, v, **keywords)


def normal(shape: Any = (3, 4), **keywords: Any) -> Any:
    return sk.philox_normal(shape, **({"seed": 0, "sample_ids": [0, 1, 2]} | keywords))


def uniform(shape: Any = (3, 4), **keywords: Any) -> Any:
    return sk.philox_uniform(shape, **({"seed": 0, "sample_ids": [0, 1, 2]} | keywords))


def noised(x0: Any = X, step_index: Any = None, schedule: Any = SCHEDULE, **keywords: Any) -> Any:
    step_index = torch.tensor([0, 1, 2]) if step_index is None else step_index
    return sk.add_noise(x0, step_index, schedule, **({"seed": 0, "sample_ids": [0, 1, 2]} | keywords))


def loss(prediction: Any = X, x0: Any = X, step_index: Any = None, schedule: Any = SCHEDULE, **keywords: Any) -> Any:
    step_index = torch.tensor([0, 1, 2]) if step_index is None else step_index
    return sk.denoising_loss(prediction, x0, step_index, schedule, **({"seed": 0, "sample_ids": [0, 1, 2]} | keywords))


def step(**keywords: Any) -> Any:
    arguments = {
        "x_t": X, "cond": X, "uncond": None, "schedule": SCHEDULE, "step_index": 5, "next_index": 4,
        "seed": 0, "sample_ids": [0, 1, 2],
    }  # fmt: skip
    return sk.sampler_step(**(arguments | keywords))


def drawn(schedule: Any = SCHEDULE, **keywords: Any) -> Any:
    return sk.draw_step_index(schedule, **({"seed": 0, "sample_ids": [0, 1, 2]} | keywords))


def drawn_and_noised(schedule: Any = SCHEDULE, **keywords: Any) -> Any:
    return sk.add_noise(X, None, schedule, **({"seed": 0, "sample_ids": [0, 1, 2]} | keywords))


@pytest.mark.parametrize(
    "function", [image_norm, attend, normal, uniform, noised, loss, step, drawn, drawn_and_noised]
)
def test_the_arguments_that_the_cases_below_change_are_accepted(function: Callable[[], Any]) -> None:
    function()


GROUP_NORM = [
    ({"x": [1.0]}, TypeError, "x is a list; it must be a tensor"),
    ({"x": X.int()}, TypeError, "x has dtype torch.int32; accepted are float32, bfloat16, float16, float64"),
    ({"x": torch.randn(8)}, ValueError, r"x has shape \(8,\); it must have at least 2 dimensions"),
    ({"x": (X, X, X)}, TypeError, "x is a tuple; it must be a tensor"),
    ({"x": (X, 1)}, TypeError, "skip is a int; it must be a tensor"),
    ({"x": (X, X[:2])}, ValueError, r"skip has shape \(2, 8, 4, 5\); it must be \(3, 8, 4, 5\)"),
    ({"x": (X, X[..., 1:])}, ValueError, r"skip has shape \(3, 8, 4, 4\); it must be \(3, 8, 4, 5\)"),
    ({"x": (X, X[:, :, 0, 0])}, ValueError, r"skip has shape \(3, 8\); it must be \(3, 8, 4, 5\)"),
    ({"x": (X, X.bfloat16())}, TypeError, "skip has dtype torch.bfloat16 and h torch.float32; .* the same"),
    ({"x": (X, X.to(META))}, ValueError, "skip is on meta and h on cpu; they must be on one device"),
    ({"x": (X, X), "residual": X}, ValueError, r"residual came with a pair \(h, skip\); give one or the other"),
    ({"num_groups": 3}, ValueError, "num_groups is 3; it must divide the 8 channels of x"),
    ({"num_groups": 0}, ValueError, "num_groups is 0; it must divide the 8 channels of x"),
    ({"num_groups": 4.0}, TypeError, "num_groups is a float; it must be an int"),
    ({"num_groups": True}, TypeError, "num_groups is a bool; it must be an int"),
    ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\); it must be \(8,\)"),
    ({"weight": torch.ones(8, dtype=torch.int64)}, TypeError, "weight has dtype torch.int64; accepted are"),
    ({"weight": torch.ones(8, device=META)}, ValueError, "weight is on meta and x on cpu"),
    ({"bias": 1.0}, TypeError, "bias is a float; it must be a tensor"),
    ({"bias": torch.ones(8, 1)}, ValueError, r"bias has shape \(8, 1\); it must be \(8,\)"),
    ({"modulations": None}, TypeError, r"modulations is a NoneType; it must be a sequence of \(scale, shift\) pairs"),
    ({"modulations": [(SCALE, SCALE)] * 3}, ValueError, "modulations has 3 pairs; at most 2 are accepted"),
    ({"modulations": (SCALE, SCALE)}, TypeError, r"modulations\[0\] is a Tensor; it must be a pair \(scale, shift\)"),
    ({"modulations": [(SCALE,)]}, TypeError, r"modulations\[0\] is a tuple; it must be a pair \(scale, shift\)"),
    ({"modulations": [(SCALE, SCALE), (SCALE[:1], SCALE)]}, ValueError,
     r"modulations\[1\] scale has shape \(1, 8\); it must be \(3, 8\)"),
    ({"modulations": [(SCALE, SCALE[:, None])]}, ValueError,
     r"modulations\[0\] shift has shape \(3, 1, 8\); it must be \(3, 8\)"),
    ({"modulations": [(SCALE, None)]}, TypeError, r"modulations\[0\] shift is a NoneType; it must be a tensor"),
    ({"modulations": [(SCALE, SCALE.to(META))]}, ValueError, r"modulations\[0\] shift is on meta and x on cpu"),
    ({"scale_offset": SCALE}, TypeError, "scale_offset is a Tensor; it must be a number"),
    ({"scale_offset": float("-inf")}, ValueError, "scale_offset is -inf; it must be finite"),
    ({"scale_offset": float("nan")}, ValueError, "scale_offset is nan; it must be finite"),
    ({"scale_offset": True}, TypeError, "scale_offset is a bool; it must be a number"),
    ({"residual_scale": True}, TypeError, "residual_scale is a bool; it must be a number"),
    ({"eps": "small"}, TypeError, "eps is a str; it must be a number"),
    ({"eps": -1.0}, ValueError, "eps is -1.0; it must not be negative"),
    ({"eps": float("nan")}, ValueError, "eps is nan; it must be finite"),
    ({"eps": 10**400}, ValueError, "eps is 10+; it must be finite"),
    ({"x": torch.eye(4).to_sparse()}, TypeError, "x has layout torch.sparse_coo; it must be a dense tensor"),
    ({"activation": "relu"}, ValueError, r"activation is 'relu'; it must be one of \['silu', None\]"),
    ({"residual": X[:2]}, ValueError, r"residual has shape \(2, 8, 4, 5\); it must be \(3, 8, 4, 5\)"),
    ({"residual": X.half()}, TypeError, "residual has dtype torch.float16 and x torch.float32; .* the same"),
    ({"residual": X.to(META)}, ValueError, "residual is on meta and x on cpu; they must be on one device"),
    ({"residual": X, "residual_scale": SCALE}, TypeError, "residual_scale is a Tensor; it must be a number"),
    ({"residual": X, "residual_scale": float("inf")}, ValueError, "residual_scale is inf; it must be finite"),
    ({"residual_scale": 0.5}, ValueError, "residual_scale is 0.5 and residual None; without a residual it must be 1"),
    ({"x": (X, X), "residual_scale": 0.5}, ValueError, "residual_scale is 0.5 and residual None; without a residual"),
    ({"dropout_p": 1.0, "seed": 0}, ValueError, r"dropout_p is 1.0; it must be in \[0, 1\)"),
    ({"dropout_p": -0.1, "seed": 0}, ValueError, r"dropout_p is -0.1; it must be in \[0, 1\)"),
    ({"dropout_p": float("nan"), "seed": 0}, ValueError, r"dropout_p is nan; it must be finite"),
    ({"dropout_p": None}, TypeError, "dropout_p is a NoneType; it must be a number"),
    ({"dropout_p": 0.1}, ValueError, "seed is None; dropout_p > 0 needs a seed"),
    ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed is a float; it must be an int or a 0-d integer tensor"),
    ({"dropout_p": 0.1, "seed": torch.zeros(4, dtype=torch.int64)}, ValueError,
     r"seed has shape \(4,\); it must be \(3,\)"),
    ({"dropout_p": 0.1, "seed": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"seed has shape \(3, 1\)"),
    ({"dropout_p": 0.1, "seed": torch.zeros(3)}, TypeError, "seed has dtype torch.float32; .* integer"),
    ({"dropout_p": 0.1, "seed": torch.zeros((), dtype=torch.int64, device=META)}, ValueError,
     "seed is on meta; it must be on cpu"),
]  # fmt: skip
ATTENTION = [
    ({"q": None}, TypeError, "q is a NoneType; it must be a tensor"),
    ({"k": TOKENS.int()}, TypeError, "k has dtype torch.int32; accepted are"),
    ({"q": TOKENS[0]}, ValueError, r"q has shape \(5, 3, 4\); it must be \(B, T, H, D\)"),
    ({"v": TOKENS[None]}, ValueError, r"v has shape \(1, 2, 5, 3, 4\); it must be \(B, T, H, D\)"),
    ({"k": TOKENS[:, :0], "v": TOKENS[:, :0]}, ValueError, r"k has shape \(2, 0, 3, 4\); .* at least one key"),
    ({"k": TOKENS[:, :, :2]}, ValueError, r"k has shape \(2, 5, 2, 4\); it must be \(2, 5, 3, 4\)"),
    ({"k": TOKENS[:1]}, ValueError, r"k has shape \(1, 5, 3, 4\); it must be \(2, 5, 3, 4\)"),
    ({"v": TOKENS[:, 1:]}, ValueError, r"v has shape \(2, 4, 3, 4\); it must be \(2, 5, 3, 4\)"),
    ({"v": TOKENS[..., 1:]}, ValueError, r"v has shape \(2, 5, 3, 3\); it must be \(2, 5, 3, 4\)"),
    ({"k": TOKENS.bfloat16()}, TypeError, "k has dtype torch.bfloat16 and q torch.float32; they must be the same"),
    ({"v": TOKENS.double()}, TypeError, "v has dtype torch.float64 and q torch.float32; they must be the same"),
    ({"v": TOKENS.to(META)}, ValueError, "v is on meta and q on cpu; they must be on one device"),
    ({"scale": "large"}, TypeError, "scale is a str; it must be a number"),
    ({"scale": torch.ones(())}, TypeError, "scale is a Tensor; it must be a number"),
]
PACKED = [
    ({"qkv": [TOKENS] * 3}, TypeError, "qkv is a list; it must be a tensor"),
    ({"qkv": TOKENS}, ValueError, r"qkv has shape \(2, 5, 3, 4\); it must be \(B, T, 3, H, D\)"),
    ({"qkv": torch.randn(2, 5, 2, 3, 4)}, ValueError, r"qkv has shape .* it must be \(B, T, 3, H, D\)"),
    ({"qkv": torch.randn(2, 0, 3, 3, 4)}, ValueError, "qkv has shape .* it must have at least one position"),
    ({"qkv": torch.zeros(2, 5, 3, 3, 4).bool()}, TypeError, "qkv has dtype torch.bool; accepted are"),
]
PHILOX = [
    ({"shape": 3}, TypeError, "shape is a int; it must be a sequence of ints"),
    ({"shape": ()}, ValueError, r"shape is \(\); it must be the number of samples, then"),
    ({"shape": (3, 3.0)}, TypeError, r"shape is \(3, 3.0\); its entries must be ints"),
    ({"shape": (3, -1)}, ValueError, r"shape is \(3, -1\); it must be the number of samples, then"),
    ({"shape": (3, 2**17, 2**17)}, ValueError, r"shape is \(3, .* fewer than 2\^34 elements"),
    ({"seed": 0.5}, TypeError, "seed is a float; it must be an int or a 0-d integer tensor"),
    ({"seed": True}, TypeError, "seed is a bool; it must be an int or a 0-d integer tensor"),
    ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed has shape \(3,\); .* an int or a 0-d tensor"),
    ({"seed": torch.zeros(())}, TypeError, "seed has dtype torch.float32; it must be an integer tensor"),
    ({"sample_ids": [0, 1]}, ValueError, r"sample_ids has shape \(2,\); it must be \(3,\)"),
    ({"sample_ids": 3}, TypeError, r"sample_ids is a int; it must be an \(N,\) integer tensor or list of ints"),
    ({"sample_ids": [0, 1, 2.5]}, TypeError, "sample_ids holds a float; its entries must be ints"),
    ({"sample_ids": [0, 1, True]}, TypeError, "sample_ids holds a bool; its entries must be ints"),
    ({"sample_ids": torch.zeros(3)}, TypeError, "sample_ids has dtype torch.float32; it must be an integer tensor"),
    ({"sample_ids": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"sample_ids has shape \(3, 1\)"),
    ({"step": 1.0}, TypeError, "step is a float; it must be an int or"),
    ({"step": torch.zeros(2, dtype=torch.int64)}, ValueError, r"step has shape \(2,\); it must be \(3,\)"),
    ({"stream": "pixels"}, ValueError, r"stream is 'pixels'; it must be one of \['timestep', 'noise', 'dropout', .*\]"),
    ({"dtype": torch.int64}, ValueError, r"dtype is torch.int64; it must be one of \[torch.float32, .*\]"),
    ({"device": "meta", "sample_ids": torch.arange(3)}, ValueError, "sample_ids is on cpu; it must be on meta"),
]
UNIFORM = [
    ({"dtype": torch.bfloat16}, ValueError, r"dtype is torch.bfloat16; it must be one of .*float32, torch.float64\]"),
    ({"dtype": torch.float16}, ValueError, r"dtype is torch.float16; it must be one of .*float32, torch.float64\]"),
]
KEYED = [
    ({"step_index": 3}, TypeError, r"step_index is a int; it must be an \(N,\) integer tensor"),
    ({"step_index": torch.zeros(2, dtype=torch.int64)}, ValueError, r"step_index has shape \(2,\); it must be \(3,\)"),
    ({"step_index": torch.zeros(3)}, TypeError, "step_index has dtype torch.float32; it must be an integer tensor"),
    ({"step_index": torch.zeros(3, dtype=torch.int64, device=META)}, ValueError, "step_index is on meta; .* on cpu"),
    ({"schedule": "linear"}, TypeError, "schedule is a str; it must be a NoiseSchedule"),
    ({"schedule": SCHEDULE.to(META)}, ValueError, r"schedule is on meta and the images on cpu; call schedule.to"),
    ({"seed": None}, TypeError, "seed is a NoneType; it must be an int or a 0-d integer tensor"),
    ({"sample_ids": [0]}, ValueError, r"sample_ids has shape \(1,\); it must be \(3,\)"),
    ({"step": torch.zeros(2, dtype=torch.int64)}, ValueError, r"step has shape \(2,\); it must be \(3,\)"),
]
ADD_NOISE = [
    ({"x0": "image"}, TypeError, "x0 is a str; it must be a tensor"),
    ({"x0": X.long()}, TypeError, "x0 has dtype torch.int64; accepted are float32, .*, float64, uint8"),
    ({"x0": torch.randn(3)}, ValueError, r"x0 has shape \(3,\); it must have at least 2 dimensions"),
    ({"x0": X.int()}, TypeError, "x0 has dtype torch.int32; accepted are float32, .*, float64, uint8"),
    ({"dtype": torch.int64}, ValueError, r"dtype is torch.int64; it must be one of \[torch.float32, .*\]"),
    ({"dtype": torch.uint8}, ValueError, r"dtype is torch.uint8; it must be one of \[torch.float32, .*\]"),
    ({"dtype": "bf16"}, ValueError, r"dtype is 'bf16'; it must be one of \[torch.float32, .*\]"),
    ({"sampling": "stratified"}, ValueError,
     "sampling is 'stratified' and strata None with a step_index; they are for step_index None"),
    ({"strata": (0, 3)}, ValueError, r"sampling is 'uniform' and strata \(0, 3\) with a step_index; they are for"),
]  # fmt: skip
DRAWN = [
    ({"schedule": None}, TypeError, "schedule is a NoneType; it must be a NoiseSchedule"),
    ({"sampling": "strat"}, ValueError, r"sampling is 'strat'; it must be one of \['uniform', 'stratified', .*\]"),
    ({"sampling": None}, ValueError, r"sampling is None; it must be one of \['uniform', .*\]"),
    ({"strata": (0, 3)}, ValueError, r"strata is \(0, 3\) with sampling 'uniform'; only 'stratified' takes it"),
    ({"sampling": "stratified", "strata": (1, 3)}, ValueError,
     r"strata is \(1, 3\) for 3 samples; 0 <= first <= total - 3 holds"),
    ({"sampling": "stratified", "strata": (-1, 9)}, ValueError, r"strata is \(-1, 9\) for 3 samples; 0 <= first <="),
    ({"sampling": "stratified", "strata": (0, 2)}, ValueError, r"strata is \(0, 2\) for 3 samples; 0 <= first <="),
    ({"sampling": "stratified", "strata": (0, 2**31)}, ValueError, r"strata is \(0, .* total < 2\^31 and total \* num"),
    ({"sampling": "stratified", "strata": (0, 2**29), "schedule": sk.NoiseSchedule.linear(2**10)}, ValueError,
     r"strata is \(0, 536870912\) with 1024 steps; total < 2\^31 and total \* num_steps < 2\^39 holds"),
    ({"sampling": "stratified", "strata": 3}, TypeError, r"strata is 3; it must be a pair of ints \(first, total\)"),
    ({"sampling": "stratified", "strata": (0, 3.0)}, TypeError, r"strata is \(0, 3.0\); it must be a pair of ints"),
    ({"sampling": "stratified", "strata": (False, 3)}, TypeError, r"strata is \(False, 3\); it must be a pair of ints"),
    ({"sampling": "stratified", "strata": (0, np.int64(2))}, ValueError,
     r"strata is \(0, 2\) for 3 samples; 0 <= first"),
    ({"sampling": "stratified", "strata": (0, 3, 1)}, TypeError, r"strata is \(0, 3, 1\); it must be a pair of ints"),
    ({"sampling": "stratified", "step": torch.arange(3)}, ValueError,
     r"step has shape \(3,\); 'stratified' takes an int or a 0-d tensor"),
    ({"step": torch.arange(2)}, ValueError, r"step has shape \(2,\); it must be \(3,\)"),
    ({"seed": None}, TypeError, "seed is a NoneType; it must be an int or a 0-d integer tensor"),
    ({"sample_ids": 3}, TypeError, r"sample_ids is a int; it must be an \(N,\) integer tensor or list of ints"),
    ({"sample_ids": torch.zeros(3)}, TypeError, "sample_ids has dtype torch.float32; it must be an integer tensor"),
    ({"sample_ids": torch.zeros(3, dtype=torch.int64, device=META)}, ValueError, "sample_ids is on meta; .* on cpu"),
]  # fmt: skip
LOSS = [
    ({"prediction": None}, TypeError, "prediction is a NoneType; it must be a tensor"),
    ({"prediction": torch.randn(3)}, ValueError, r"prediction has shape \(3,\); it must have at least 2 dimensions"),
    ({"x0": X.long()}, TypeError, "x0 has dtype torch.int64; accepted are"),
    ({"x0": X[:, :1]}, ValueError, r"x0 has shape \(3, 1, 4, 5\); it must be \(3, 8, 4, 5\)"),
    ({"x0": X.to(META)}, ValueError, "x0 is on meta and prediction on cpu; they must be on one device"),
    ({"target": "noise"}, ValueError, r"target is 'noise'; it must be one of \['eps', 'v', 'x0'\]"),
    ({"weights": [1.0] * 10}, TypeError, "weights is a list; it must be a tensor"),
    ({"weights": torch.ones(3)}, ValueError, r"weights has shape \(3,\); it must be \(10,\)"),
    ({"weights": torch.ones(10, device=META)}, ValueError, "weights is on meta and prediction on cpu"),
    ({"weights": torch.ones(10), "schedule": None}, TypeError, "schedule is a NoneType; it must be a NoiseSchedule"),
]
SAMPLER = [
    ({"x_t": None}, TypeError, "x_t is a NoneType; it must be a tensor"),
    ({"x_t": torch.randn(3)}, ValueError, r"x_t has shape \(3,\); it must have at least 2 dimensions"),
    ({"cond": None}, TypeError, "cond is a NoneType; it must be a tensor"),
    ({"cond": X[:2]}, ValueError, r"cond has shape \(2, 8, 4, 5\); it must be \(3, 8, 4, 5\)"),
    ({"uncond": X.bfloat16()}, TypeError, "uncond has dtype torch.bfloat16 and x_t torch.float32; .* the same"),
    ({"uncond": X.to(META)}, ValueError, "uncond is on meta and x_t on cpu; they must be on one device"),
    ({"cfg_scale": 2.0}, ValueError, "uncond is None with cfg_scale 2.0; guidance needs it"),
    ({"cfg_scale": "strong"}, TypeError, "cfg_scale is a str; it must be a number"),
    ({"schedule": None}, TypeError, "schedule is a NoneType; it must be a NoiseSchedule"),
    ({"schedule": SCHEDULE.to(META)}, ValueError, r"schedule is on meta and the images on cpu; call schedule.to"),
    ({"method": "euler"}, ValueError, r"method is 'euler'; it must be one of \['ddpm', 'ddim', 'dpmpp_2m'\]"),
    ({"target": "score"}, ValueError, r"target is 'score'; it must be one of \['eps', 'v', 'x0'\]"),
    ({"eta": 1.5}, ValueError, r"eta is 1.5; it must be in \[0, 1\]"),
    ({"eta": None}, TypeError, "eta is a NoneType; it must be a number"),
    ({"eta": 0.5, "method": "ddpm"}, ValueError, "eta is 0.5 with method 'ddpm'; only 'ddim' takes it"),
    ({"clip_x0": 0.0}, ValueError, "clip_x0 is 0.0; it must be positive and within fp32, or None"),
    ({"clip_x0": 1e39}, ValueError, "clip_x0 is 1e\\+39; it must be positive and within fp32, or None"),
    ({"cfg_scale": 1e39, "uncond": X}, ValueError, "cfg_scale is 1e\\+39; it must be within fp32"),
    ({"clip_x0": float("nan")}, ValueError, "clip_x0 is nan; it must be finite"),
    ({"clip_x0": "yes"}, TypeError, "clip_x0 is a str; it must be a number"),
    ({"guidance_rescale": 0.7}, ValueError, "uncond is None with guidance_rescale 0.7; only guided outputs are"),
    ({"guidance_rescale": -0.1, "uncond": X}, ValueError, r"guidance_rescale is -0.1; it must be in \[0, 1\]"),
    ({"guidance_rescale": 1.5, "uncond": X}, ValueError, r"guidance_rescale is 1.5; it must be in \[0, 1\]"),
    ({"guidance_rescale": float("nan"), "uncond": X}, ValueError, "guidance_rescale is nan; it must be finite"),
    ({"guidance_rescale": None}, TypeError, "guidance_rescale is a NoneType; it must be a number"),
    ({"step_index": 10}, ValueError, r"step_index is 10; it must be in \[0, 9\]"),
    ({"step_index": np.int32(10)}, ValueError, r"step_index is 10; it must be in \[0, 9\]"),
    ({"next_index": np.int64(5)}, ValueError, "next_index is 5 and step_index 5; a step goes to a smaller index"),
    ({"next_index": np.bool_(True)}, TypeError, "next_index is a bool_?; it must be an int or a 0-d integer tensor"),
    ({"step_index": -1}, ValueError, r"step_index is -1; it must be in \[0, 9\]"),
    ({"step_index": 5.0}, TypeError, "step_index is a float; it must be an int or a 0-d integer tensor"),
    ({"step_index": torch.tensor([5, 5, 5])}, ValueError, r"step_index has shape \(3,\); .* an int or a 0-d tensor"),
    ({"next_index": -2}, ValueError, r"next_index is -2; it must be in \[-1, 9\]"),
    ({"next_index": 5}, ValueError, "next_index is 5 and step_index 5; a step goes to a smaller index"),
    ({"next_index": True}, TypeError, "next_index is a bool; it must be an int or a 0-d integer tensor"),
    ({"next_index": torch.tensor(4.0)}, TypeError, "next_index has dtype torch.float32; it must be an integer tensor"),
    ({"previous_x0": X}, ValueError, "previous_x0 and previous_index go together; give both or neither"),
    ({"previous_index": 6}, ValueError, "previous_x0 and previous_index go together; give both or neither"),
    ({"previous_x0": X[:1], "previous_index": 6}, ValueError, r"previous_x0 has shape \(1, 8, 4, 5\); it must be"),
    ({"previous_x0": X, "previous_index": 10}, ValueError, r"previous_index is 10; it must be in \[0, 9\]"),
    ({"previous_x0": X, "previous_index": 5}, ValueError, "previous_index is 5 and step_index 5; .* the larger"),
    ({"method": "ddpm", "seed": None}, ValueError, "method 'ddpm' with eta 0.0 draws noise; it needs seed and sample"),
    ({"eta": 0.5, "sample_ids": None}, ValueError, "method 'ddim' with eta 0.5 draws noise; it needs seed and sample"),
    ({"eta": 0.5, "sample_ids": [1]}, ValueError, r"sample_ids has shape \(1,\); it must be \(3,\)"),
    ({"eta": 0.5, "seed": 0.5}, TypeError, "seed is a float; it must be an int or a 0-d integer tensor"),
]
SCHEDULES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: sk.NoiseSchedule.cosine(0), ValueError, "num_steps is 0; it must be a positive int"),
    (lambda: sk.NoiseSchedule.linear(10.0), ValueError, "num_steps is 10.0; it must be a positive int"),  # type: ignore[arg-type]
    (lambda: sk.NoiseSchedule.inverted_cosine(True), ValueError, "num_steps is True; it must be a positive int"),
    (lambda: sk.NoiseSchedule.linear(10, 0.0, 0.02), ValueError, "beta_start, beta_end are 0.0, 0.02; 0 < beta_start"),
    (lambda: sk.NoiseSchedule.linear(10, 0.3, 0.1), ValueError, "beta_start, beta_end are 0.3, 0.1; 0 < beta_start"),
    (lambda: sk.NoiseSchedule.cosine(10, dtype=torch.bfloat16), ValueError, "dtype is torch.bfloat16; it must be one"),
    (lambda: sk.NoiseSchedule.from_alpha_bar([0.5]), TypeError, "alpha_bar is a list; it must be a tensor"),  # type: ignore[arg-type]
    (
        lambda: sk.NoiseSchedule.from_alpha_bar(torch.ones(2, 2) / 2),
        ValueError,
        r"alpha_bar has shape \(2, 2\); it must",
    ),
    (lambda: sk.NoiseSchedule.from_alpha_bar(torch.ones(0)), ValueError, r"alpha_bar has shape \(0,\); it must"),
    (
        lambda: sk.NoiseSchedule.from_alpha_bar(torch.tensor([1.0])),
        ValueError,
        r"alpha_bar has values outside \(0, 1\)",
    ),
    (lambda: sk.NoiseSchedule.from_alpha_bar(torch.tensor([0.5, float("nan")])), ValueError, "alpha_bar has values"),
]


def named(cases: list[Any]) -> list[Any]:
    """Cases with the ids of the arguments that they change and a number."""
    return [pytest.param(*case, id=f"{i}-{'-'.join(case[0])}") for i, case in enumerate(cases)]


def assert_raises(function: Callable[..., Any], keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}") as caught:
        function(**keywords)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("keywords", "error", "message"), named(GROUP_NORM))
def test_modulated_group_norm(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_raises(image_norm, keywords, error, message)


@pytest.mark.parametrize(("keywords", "error", "message"), named(ATTENTION))
def test_attention(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_raises(attend, keywords, error, message)


@pytest.mark.parametrize(("keywords", "error", "message"), named(PACKED))
def test_attention_qkvpacked(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_raises(sk.attention_qkvpacked, keywords, error, message)


@pytest.mark.parametrize(("keywords", "error", "message"), named(PHILOX))
def test_philox(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_raises(normal, keywords, error, message)
    assert_raises(uniform, keywords, error, message)


@pytest.mark.parametrize(("keywords", "error", "message"), named(UNIFORM))
def test_philox_uniform(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_raises(uniform, keywords, error, message)


@pytest.mark.parametrize("function", [noised, loss])
@pytest.mark.parametrize(("keywords", "error", "message"), named(KEYED))
def test_noise_keys(
    function: Callable[..., Any], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    assert_raises(function, keywords, error, message)


@pytest.mark.parametrize(("keywords", "error", "message"), named(ADD_NOISE))
def test_add_noise(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_raises(noised, keywords, error, message)


@pytest.mark.parametrize("function", [drawn, drawn_and_noised])
@pytest.mark.parametrize(("keywords", "error", "message"), named(DRAWN))
def test_drawn_step_indices(
    function: Callable[..., Any], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    assert_raises(function, keywords, error, message)


@pytest.mark.parametrize(("keywords", "error", "message"), named(LOSS))
def test_denoising_loss(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_raises(loss, keywords, error, message)


@pytest.mark.parametrize(("keywords", "error", "message"), named(SAMPLER))
def test_sampler_step(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_raises(step, keywords, error, message)


@pytest.mark.parametrize(("build", "error", "message"), SCHEDULES)
def test_noise_schedule(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    assert_raises(build, {}, error, message)


def test_module() -> None:
    with pytest.raises(ValueError, match="activation is 'gelu'; it must be one of"):
        sk.ModulatedGroupNorm(4, 8, activation="gelu")
    with pytest.raises(ValueError, match=r"dropout_p is 1; it must be in \[0, 1\)"):
        sk.ModulatedGroupNorm(4, 8, dropout_p=1)
    with pytest.raises(ValueError, match="num_channels"):
        sk.ModulatedGroupNorm(3, 8)
    with pytest.raises(ValueError, match="dropout_p > 0 needs a seed"):
        sk.ModulatedGroupNorm(4, 8, dropout_p=0.5)(X)


def test_no_check_reads_a_tensors_values() -> None:
    """None waits for a device: on meta tensors, which have no values, every function passes."""
    x, ids, schedule = X.to(META), torch.arange(3, device=META), SCHEDULE.to(META)
    scalar = torch.zeros((), dtype=torch.int64, device=META)
    image_norm(x, modulations=[(SCALE.to(META),) * 2], residual=x, dropout_p=0.5, seed=ids)
    attend(*[TOKENS.to(META)] * 3)
    normal(seed=scalar, sample_ids=ids, step=ids)
    noised(x, ids, schedule, sample_ids=ids)
    for sampling in ("uniform", "stratified", "logit_normal"):
        drawn(schedule, seed=scalar, sample_ids=ids, step=scalar, sampling=sampling)
        sk.add_noise(x, None, schedule, seed=scalar, sample_ids=ids, step=scalar, sampling=sampling)
    loss(x, x, ids, schedule, sample_ids=ids, weights=schedule.alpha)
    images = {"x_t": x, "cond": x, "uncond": x, "previous_x0": x}
    indices = {"step_index": scalar, "next_index": scalar, "previous_index": scalar}
    step(**images, **indices, schedule=schedule, method="dpmpp_2m", clip_x0=1.0)
    step(x_t=x, cond=x, schedule=schedule, method="ddpm", seed=scalar, sample_ids=ids)
