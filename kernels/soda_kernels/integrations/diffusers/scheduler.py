"""A scheduler for diffusers' pipelines over the fused sampler steps: DDIM, DDPM and DPM-Solver++ 2M.

A step's indices and tables lie on the samples' device and its place in the loop is known on the host, so that no step
waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from soda_kernels._checks import check_choice
from soda_kernels.diffusion.api_sampler import sampler_step
from soda_kernels.diffusion.schedule import NoiseSchedule
from soda_kernels.integrations.diffusers.loop import Loop
from soda_kernels.integrations.diffusers.noise_key import Generators, draw_noise_key
from soda_kernels.integrations.diffusers.timesteps import alpha_bars, spaced, spaced_for_multistep

ALGORITHMS: dict[Any, str] = {
    DDIMScheduler: "ddim", DDPMScheduler: "ddpm", DPMSolverMultistepScheduler: "dpmpp_2m"
}  # fmt: skip
"""What each of diffusers' schedulers is called here."""

TARGETS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""What each of diffusers' prediction types is called here."""

# Options of diffusers' schedulers that there are no kernels for, and the values at which they change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {"thresholding": (False,), "rescale_betas_zero_snr": (False,)}
_PLAIN_BY_ALGORITHM: dict[str, dict[str, tuple[Any, ...]]] = {
    "ddim": {},
    "ddpm": {"variance_type": (None, "fixed_small", "fixed_small_log")},
    "dpmpp_2m": {
        "algorithm_type": ("dpmsolver++",), "solver_type": ("midpoint",), "variance_type": (None, "fixed_small"),
        **dict.fromkeys(
            ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas",
             "use_dynamic_shifting"), (False, None)
        ),
    },
}  # fmt: skip

# From this many steps on DPMSolverMultistepScheduler's lower_order_final changes nothing.
_MANY_STEPS = 15


@dataclass
class SodaSchedulerOutput(BaseOutput):
    """The sample at the next timestep, and the clean one as predicted, both like the sample before."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class SodaScheduler(SchedulerMixin, ConfigMixin):
    """One of diffusers' schedulers with fused steps.

        pipe.scheduler = SodaScheduler.from_config(pipe.scheduler.config)

    It takes the timesteps that diffusers' own takes, and its samples are the same up to rounding. `DDIMPipeline` makes
    any scheduler that it is made with a DDIMScheduler: give it this one afterwards.

    DDIM with clip_sample prepares its step in plain PyTorch, since diffusers keeps the noise direction of the
    prediction before clipping. `step(..., use_clipped_model_output=True)` recomputes it, in one fused launch.

    Noise is drawn inside the step, by Philox, from a seed that is drawn from the generator in each step: a generator's
    state decides the images, which are not those that diffusers would draw with it. With a list of generators sample n
    depends on generator n alone, as in diffusers.

    Args:
        algorithm: "ddim", "ddpm" or "dpmpp_2m". `from_config` knows it from diffusers' class.
        num_train_timesteps, beta_start, beta_end, trained_betas: as in diffusers.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", or "inverted_cosine", SODA's.
        prediction_type: "epsilon", "v_prediction" or "sample".
        timestep_spacing: "leading", "trailing" or "linspace"; diffusers' default for the algorithm if None.
        steps_offset, clip_sample_range: as in diffusers.
        clip_sample: diffusers' default for the algorithm if None. "dpmpp_2m" clips too, which diffusers' does not.
        set_alpha_to_one: of "ddim", whether the last step goes to the clean end, or to timestep 0.
        solver_order, lower_order_final, euler_at_final, final_sigmas_type, lambda_min_clipped: of "dpmpp_2m", as in
            diffusers, with solver_order 1 or 2.

    Raises:
        ValueError: an argument is none of those named, or a config has an option that there is no kernel for.
    """

    _compatibles = [each.name for each in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        algorithm: str = "ddim",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | np.ndarray | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str | None = None,
        steps_offset: int = 0,
        clip_sample: bool | None = None,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        solver_order: int = 2,
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
    ) -> None:
        check_choice("algorithm", algorithm, list(ALGORITHMS.values()))
        check_choice("prediction_type", prediction_type, list(TARGETS))
        check_choice("solver_order", solver_order, (1, 2))
        check_choice("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        multistep = algorithm == "dpmpp_2m"
        self.register_to_config(
            timestep_spacing=timestep_spacing or ("linspace" if multistep else "leading"),
            clip_sample=not multistep if clip_sample is None else clip_sample,
        )
        self.betas, self.alphas_cumprod = alpha_bars(
            beta_schedule, num_train_timesteps, beta_start, beta_end, trained_betas
        )
        self.alphas = 1.0 - self.betas
        self.schedule = NoiseSchedule.from_alpha_bar(self.alphas_cumprod, name=beta_schedule)
        # On the host, where steps that need a number of these do not wait for a device.
        self._alpha, self._sigma = self.schedule.alpha.tolist(), self.schedule.sigma.tolist()
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        everything = np.arange(num_train_timesteps)[::-1].copy()
        self._begin(Loop(everything, everything - 1))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a scheduler of one of diffusers' configs, or of its own.

        Args:
            config: a scheduler's `config`.
            return_unused_kwargs, kwargs: as in diffusers; kwargs replace what the config says. `algorithm` among them
                is needed with configs of schedulers other than DDIM, DDPM and DPMSolverMultistep.

        Raises:
            ValueError: the algorithm is not known, or the config has an option that there is no kernel for.
        """
        merged = {**config, **kwargs}
        if "algorithm" not in merged:
            kwargs["algorithm"] = merged["algorithm"] = _algorithm_of(config)
        check_choice("algorithm", merged["algorithm"], list(ALGORITHMS.values()))
        for option, plain in {**_PLAIN, **_PLAIN_BY_ALGORITHM[merged["algorithm"]]}.items():
            if option in merged:
                check_choice(f"the config's {option}", merged[option], plain)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def config(self) -> Any:
        """What the scheduler was made with, by attribute or by key."""
        return super().config

    @property
    def step_index(self) -> int | None:
        """The place in `timesteps` that comes next; None before the first step."""
        return self._loop.next_place

    @property
    def begin_index(self) -> int | None:
        """The place in `timesteps` where the loop begins, if it was said."""
        return self._loop.begin_place

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say where in `timesteps` the loop begins."""
        if isinstance(begin_index, bool) or not isinstance(begin_index, Integral) or begin_index < 0:
            raise ValueError(f"begin_index is {begin_index!r}; it must be an int of 0 or more")
        self._loop.begin_place = int(begin_index)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """List the timesteps of a loop, and forget the loop before.

        Args:
            num_inference_steps: how many, spaced as the config says.
            device: of `timesteps`; the CPU if None.
            timesteps: the timesteps themselves instead, descending.

        Raises:
            ValueError: neither or both are given, or there are timesteps out of range or out of order.
        """
        config = self.config
        most = config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps takes num_inference_steps or timesteps, one of the two")
        stride = None
        if num_inference_steps is not None:
            if not 1 <= num_inference_steps <= most:
                raise ValueError(
                    f"num_inference_steps is {num_inference_steps}; it must be in [1, num_train_timesteps], {most}"
                )
            chosen = (config.timestep_spacing, most, num_inference_steps, config.steps_offset)
            if config.algorithm == "dpmpp_2m":
                half_logsnr = self.schedule.logsnr / 2
                kept = most - int(torch.searchsorted(half_logsnr.flip(0), config.lambda_min_clipped))
                listed = spaced_for_multistep(*chosen, kept)
            else:
                listed = spaced(*chosen)
            stride = most // num_inference_steps
        else:
            listed = np.asarray(timesteps, dtype=np.int64)
            if listed.ndim != 1 or not len(listed) or (np.diff(listed) >= 0).any():
                raise ValueError(f"timesteps is {timesteps}; it must be a descending list of ints")
        if listed[0] >= most or listed[-1] < 0:
            raise ValueError(
                f"the timesteps go from {listed[0]} to {listed[-1]} with steps_offset {config.steps_offset}; "
                f"they must be in [0, {most - 1}]"
            )
        self.num_inference_steps = len(listed)
        self._begin(Loop(listed, self._following(listed, stride), device))

    def _following(self, listed: np.ndarray, stride: int | None) -> np.ndarray:
        """Where each step goes, -1 for the clean end."""
        to_first = {"ddim": not self.config.set_alpha_to_one, "dpmpp_2m": self.config.final_sigmas_type == "sigma_min"}
        end = 0 if to_first.get(self.config.algorithm) else -1
        if self.config.algorithm == "ddim" and stride is not None:
            # DDIMScheduler's own rule: in linspace spacing that is not where the next step begins.
            return np.where(listed >= stride, listed - stride, end)
        return np.append(listed[1:], end)

    def _begin(self, loop: Loop) -> None:
        """Forget the loop before."""
        self._loop, self.timesteps = loop, loop.timesteps
        self._previous: tuple[Tensor, int] | None = None

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return the sample, which a denoiser takes as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SodaSchedulerOutput | tuple[Tensor, Tensor]:
        """Step from a timestep to the next by `sampler_step` (DDIM with clip_sample: see the class).

        An element of `timesteps`, an int or a tensor in main memory says itself which step it is. Of another device's
        tensor the first of a loop is read, unless `set_begin_index` was called, and the steps after it are counted.

        Args:
            model_output: [N, C, *spatial], the denoiser's output, with guidance done. Of two dtypes, its and the
                sample's, the step takes the one that PyTorch's arithmetic would.
            timestep: one of `timesteps`.
            sample: [N, C, *spatial] at that timestep.
            eta: of "ddim", from 0, deterministic, to 1.
            use_clipped_model_output: of "ddim", whether the noise direction is recomputed from the clipped prediction.
            generator: gives the noise's seed, one or a list of N; PyTorch's default one of the sample's device if None.
            variance_noise: None; noise is drawn inside the step.
            return_dict: False returns a pair.

        Returns:
            prev_sample and pred_original_sample.

        Raises:
            TypeError, ValueError: an argument is not as above, or set_timesteps was not called.
            RuntimeError: a gradient through the step is asked for.
        """
        if self.num_inference_steps is None:
            raise ValueError("there are no timesteps yet; call set_timesteps before step")
        if variance_noise is not None:
            raise ValueError("variance_noise is given; noise is drawn inside the step, from the generator")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}; it must be that of sample, {tuple(sample.shape)}"
            )
        if not isinstance(timestep, Integral | Tensor) or (isinstance(timestep, Tensor) and timestep.numel() != 1):
            raise ValueError(f"timestep is {timestep}; it must be one of scheduler.timesteps")
        config, device = self.config, sample.device
        place = self._loop.place_of(timestep)
        self.schedule = self.schedule.to(device)
        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        model_output, sample = model_output.to(dtype), sample.to(dtype)
        target, clip = TARGETS[config.prediction_type], config.clip_sample_range if config.clip_sample else None
        if config.algorithm == "ddim" and clip is not None and not use_clipped_model_output:
            sample, model_output = self._clipped(sample, model_output, self._loop.listed[place])
            target, clip = "x0", None
        options: dict[str, Any] = {}
        if config.algorithm == "ddpm" or eta > 0:
            options["seed"], options["sample_ids"] = draw_noise_key(generator, len(sample), device)
        if self._is_second_order(place):
            assert self._previous is not None
            options["previous_x0"], before = self._previous
            options["previous_index"], _ = self._loop.indices(before, device)
        following, x0 = sampler_step(
            sample, model_output, None, self.schedule, *self._loop.indices(place, device),
            method=config.algorithm, target=target, eta=eta, clip_x0=clip, **options,
        )  # fmt: skip
        self._loop.next_place = place + 1
        if config.algorithm == "dpmpp_2m":
            self._previous = x0, place
        return SodaSchedulerOutput(prev_sample=following, pred_original_sample=x0) if return_dict else (following, x0)

    def _is_second_order(self, place: int) -> bool:
        """Tell whether DPM-Solver++ takes the x0 of the step before into account, as diffusers' own does."""
        config, last = self.config, place == len(self._loop) - 1
        if config.algorithm != "dpmpp_2m" or config.solver_order == 1:
            return False
        if self._previous is None or self._previous[1] != place - 1:
            return False
        few = config.lower_order_final and len(self._loop) < _MANY_STEPS
        return not (last and (config.euler_at_final or few or self._loop.ends_clean))

    def _clipped(self, sample: Tensor, model_output: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return the sample and the prediction of x0 that give a step with x0 clipped and the noise direction kept.

        The direction is (sample - alpha x0) / sigma: it stays where the sample moves by alpha times what x0 moves by.
        """
        alpha, sigma = self._alpha[index], self._sigma[index]
        compute = torch.promote_types(sample.dtype, torch.float32)
        wide, x0 = sample.to(compute), model_output.to(compute)
        if self.config.prediction_type == "epsilon":
            x0 = (wide - sigma * x0) / alpha
        elif self.config.prediction_type == "v_prediction":
            x0 = alpha * wide - sigma * x0
        clipped = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return torch.add(wide, clipped - x0, alpha=alpha).to(sample.dtype), clipped.to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return alpha * original_samples + sigma * noise, formed in fp32 and rounded once.

        `soda_kernels.add_noise` with `scheduler.schedule` draws its noise itself, in the same pass.

        Args:
            original_samples, noise: [N, C, *spatial].
            timesteps: [N] integers in [0, num_train_timesteps).
        """
        return self._mixed(original_samples, noise, timesteps, 1.0)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return alpha * noise - sigma * sample, the target of "v_prediction"; arguments as in `add_noise`."""
        return self._mixed(noise, sample, timesteps, -1.0)

    def _mixed(self, first: Tensor, second: Tensor, timesteps: Tensor, sign: float) -> Tensor:
        """alpha * first + sign * sigma * second."""
        self.schedule = self.schedule.to(first.device)
        timesteps = timesteps.to(first.device).flatten()
        alpha, sigma = (
            torch.take(table, timesteps).view(-1, *(1,) * (first.ndim - 1))
            for table in (self.schedule.alpha, self.schedule.sigma)
        )
        return (alpha * first + sign * sigma * second).to(torch.promote_types(first.dtype, second.dtype))

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def _algorithm_of(config: dict[str, Any]) -> str:
    """Tell which of diffusers' schedulers a config is of: by its name, which has it once saved, or by its options."""
    name = config.get("_class_name")
    options = {option for option in config if not option.startswith("_")}
    for scheduler, algorithm in ALGORITHMS.items():
        if name == scheduler.__name__ or (name is None and options == scheduler._get_init_keys(scheduler) - {"self"}):
            return algorithm
    raise ValueError(
        f"the config is of {name or 'an unknown scheduler'}; name the algorithm to use in its place, one of "
        f"{list(ALGORITHMS.values())}: SodaScheduler.from_config(config, algorithm='ddim')"
    )
