"""Which modules of a diffusers model are replaced, which are left, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from soda_kernels.integrations import norms
from soda_kernels.integrations.convolutions import Conv3x3, replace_convolutions
from soda_kernels.integrations.diffusers import attention, blocks
from soda_kernels.integrations.diffusers.agreement import require_agreement, require_diffusers
from soda_kernels.integrations.replacement import (
    NOTHING,
    OWN_FORWARD,
    Fused,
    Report,
    class_name,
    own_forward,
    replace,
    restore_modules,
)


def optimize(model: Any) -> Report:
    """Replace, in place, what the kernels compute in a model of diffusers, or in every model of a pipeline.

    Replaced are residual blocks (norm, time embedding, SiLU and dropout in one op each), group norms, `AdaGroupNorm`,
    attention that runs `AttnProcessor2_0` or `FusedAttnProcessor2_0`, the norm and SiLU of the output head, and 3x3
    convolutions (which run another kernel on a CPU in fp32 and channels_last alone). Modules get other classes and
    nothing else: parameters, their names and the state dict are as before, on every device, the meta device too, before
    and after weights are loaded. A second call changes nothing.

    Args:
        model: a `UNet2DModel`, `UNet2DConditionModel`, `AutoencoderKL` or another model of diffusers with group norms
            or 3x3 convolutions; also inside of another module, as `torch.compile` makes one; or a pipeline.

    Returns:
        What is replaced and what is left, with reasons; print it.

    Raises:
        TypeError: it is neither.
        ValueError: there is nothing in it to replace; or the installed diffusers is too old, or computes otherwise than
            is known here, which is found out with three tiny models at the first call.
        ImportError: diffusers is not installed.
    """
    require_diffusers()
    models = _models(model)
    require_agreement(_replace_in)
    report = Report(class_name(model))
    for prefix, part in models.items():
        known = report.num_replaced
        report.include(prefix, part, _replace_in(part) if _has_norms(part) else replace_convolutions(part))
        if report.num_replaced == known:
            report.left[prefix.rstrip(".") or "the model itself"] = f"it {NOTHING}"
    if not report.replaced:
        raise ValueError(f"{report.model} {NOTHING}")
    return report


def restore(model: Any) -> None:
    """Undo `optimize`: every module gets the class back that it had.

    Raises:
        TypeError: it is neither a model of diffusers nor a pipeline.
    """
    require_diffusers()
    for part in _models(model).values():
        restore_modules(part)


def _models(model: Any) -> dict[str, nn.Module]:
    """Return the models of a pipeline or the model itself, by the prefix of their modules' names."""
    from diffusers import DiffusionPipeline, ModelMixin

    def is_ours(candidate: object) -> bool:
        return isinstance(candidate, nn.Module) and any(isinstance(part, ModelMixin) for part in candidate.modules())

    if isinstance(model, DiffusionPipeline):
        found = {f"{name}.": part for name, part in model.components.items() if is_ours(part)}
        if not found:
            raise TypeError(f"{type(model).__name__} has no model of diffusers in it")
        return found
    if is_ours(model):
        return {"": model}
    where = (
        "soda_kernels.integrations.torch.optimize takes any other module"
        if isinstance(model, nn.Module)
        else "give it the model or the pipeline itself"
    )
    raise TypeError(f"model is a {type(model).__name__}, neither a model of diffusers nor a pipeline; {where}")


def _has_norms(model: nn.Module) -> bool:
    """Tell whether a model has group norms, replaced or not."""
    return any(
        norms.is_group_norm(module) or (isinstance(module, Fused) and not isinstance(module, Conv3x3))
        for module in model.modules()
    )


def _replace_in(model: nn.Module) -> dict[str, str]:
    """Replace what can be in one model, and return why the rest was left, by name."""
    left = replace_convolutions(model)
    plans = _plans()
    parts = dict(model.named_modules())
    for name, part in parts.items():
        for plain, plan in plans:
            if isinstance(part, plain):
                left |= {f"{name}.{inner}".strip("."): reason for inner, reason in plan(part).items()}
                break
    for name, part in parts.items():
        if norms.is_group_norm(part) and not isinstance(part, Fused) and name not in left:
            if own_forward(part):
                left[name] = OWN_FORWARD
            else:
                replace(part, norms.GroupNorm)
    return left


Plan = Callable[[Any], dict[str, str]]
"""Replaces a module and what belongs to it, and returns reasons by the name inside it, "" for itself."""


def _plans() -> list[tuple[Any, Plan]]:
    from diffusers.models.attention_processor import Attention, SpatialNorm
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.normalization import AdaGroupNorm
    from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    def simple(plain: type, kind: type[Fused]) -> Plan:
        def plan(module: nn.Module) -> dict[str, str]:
            reason = _why_not(module, plain)
            if reason is None:
                replace(module, kind)
            return {} if reason is None else {"": reason}

        return plan

    def attend(module: Any) -> dict[str, str]:
        reason = _why_not(module, Attention) or attention.why_left(module)
        if reason is None and attention.replacing(module.processor) is None:
            reason = f"its processor is {type(module.processor).__name__}"
        if reason is None:
            replace(module, attention.Attention)
        return {} if reason is None else {"": reason}

    def block(plain: type, kind: type[Fused], norm: type[Fused], is_norm: Callable[[nn.Module], bool]) -> Plan:
        def plan(module: Any) -> dict[str, str]:
            both = (module.norm1, module.norm2)
            reason = _why_not(module, plain)
            if not norms.is_silu(module.nonlinearity):
                reason = f"its activation is {type(module.nonlinearity).__name__}"
            elif not all(is_norm(each) for each in both):
                reason = f"its norm is a {type(module.norm1).__name__}"
            elif any(own_forward(each) for each in both):
                reason = OWN_FORWARD
            if reason is not None:
                return {"": reason}
            for each in both:
                replace(each, norm)
            replace(module, kind)
            return {}

        return plan

    def is_adaptive(module: nn.Module) -> bool:
        return isinstance(module, AdaGroupNorm) and _why_not(module, AdaGroupNorm) is None

    return [
        (ResnetBlock2D, block(ResnetBlock2D, blocks.ResnetBlock2D, norms.GroupNorm, norms.is_group_norm)),
        (ResnetBlockCondNorm2D, block(
            ResnetBlockCondNorm2D, blocks.ResnetBlockCondNorm2D, blocks.AdaGroupNorm, is_adaptive)),
        (AdaGroupNorm, simple(AdaGroupNorm, blocks.AdaGroupNorm)),
        (Attention, attend),
        (SpatialNorm, lambda module: {"": "its scale and shift are images"}),
        ((UNet2DModel, UNet2DConditionModel, Encoder, Decoder), _output_head),
    ]  # fmt: skip


def _why_not(module: nn.Module, plain: type) -> str | None:
    """Say why a module of a known class may not be replaced, or None."""
    plain_class = module.plain_class if isinstance(module, Fused) else type(module)
    if plain_class.forward is not plain.forward:  # type: ignore[attr-defined]
        return f"{plain_class.__name__} has a forward of its own"
    return OWN_FORWARD if own_forward(module) else None


def _output_head(model: Any) -> dict[str, str]:
    norm, silu = model.conv_norm_out, model.conv_act
    if norm is None or not norms.is_group_norm(norm):
        return {}  # it is replaced already; or a SpatialNorm, which tells of itself
    if not norms.is_silu(silu) or own_forward(norm) or own_forward(silu):
        return {"conv_act": "it is no SiLU that the norm before it could apply"}
    replace(norm, norms.GroupNormSilu)
    replace(silu, norms.PassedSilu)
    return {}
