"""A module gets another class and nothing else: how modules are replaced, put back, and told of.

Parameters, buffers, names, hooks and the tree of modules stay as they are, so that a state dict is the same before and
after. The class that a module gets derives from the one it had: `isinstance` answers as before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized


class Fused:
    """What the class of every replaced module derives from; a kind of replacement is a subclass.

    A kind's `fused_forward` takes the place of the plain class's `_forward` if it has one (which its `forward` then
    calls, often in a checkpoint), or else of its `forward`. A kind without it only marks a module as taken care of.
    """

    label: ClassVar[str]
    """The kind's name in a report."""
    plain_class: ClassVar[Any]
    """The class that the module had."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: what is pickled or copied is how to make it.
        return _rebuild, (kind_of(self), self.plain_class), self.__getstate__()


@functools.cache
def fused_class(kind: Any, plain_class: Any) -> Any:
    """Return the class that a module of `plain_class` gets, always the same one."""
    method = "_forward" if hasattr(plain_class, "_forward") else "forward"
    run = getattr(kind, "fused_forward", None)
    content = {"__module__": kind.__module__, "__doc__": kind.__doc__, "plain_class": plain_class}
    return type(f"Fused{plain_class.__name__}", (kind, plain_class), content | ({method: run} if run else {}))


def _rebuild(kind: Any, plain_class: Any) -> nn.Module:
    made = fused_class(kind, plain_class)
    module: nn.Module = made.__new__(made)
    return module


def kind_of(module: Any) -> type[Fused]:
    """Return the kind of a replaced module."""
    kind: type[Fused] = type(module).__bases__[0]
    return kind


def replace(module: nn.Module, kind: Any) -> None:
    """Give a module the class of a kind, also where it has that of another."""
    plain_class: Any = module.plain_class if isinstance(module, Fused) else type(module)
    module.__class__ = fused_class(kind, plain_class)


def class_name(model: object) -> str:
    """Return the name of the class that a model has, or had before it was replaced."""
    return (model.plain_class if isinstance(model, Fused) else type(model)).__name__


def restore_modules(model: nn.Module) -> int:
    """Give every replaced module the class back that it had, and return how many there were.

    Raises:
        ValueError: one was parametrized since, by a class made of the one it has now; nothing was restored.
    """
    replaced = [module for module in model.modules() if isinstance(module, Fused)]
    for module in replaced:
        if is_parametrized(module):
            raise ValueError(
                f"a {module.plain_class.__name__} was parametrized after optimize; remove its parametrizations "
                "(torch.nn.utils.parametrize.remove_parametrizations) before restore"
            )
    for module in replaced:
        module.__class__ = module.plain_class
    return len(replaced)


def own_forward(module: nn.Module) -> bool:
    """Tell whether the instance, and not its class, says what a call does: accelerate's hooks are put in so."""
    return "forward" in vars(module)


OWN_FORWARD = "its forward was set on the instance, as accelerate's hooks do: optimize before that"
NOTHING = "has no group norm and no 3x3 convolution that could be replaced"


@dataclass(frozen=True)
class Report:
    """What `optimize` did to a model; printing it shows it.

    It tells the state of the model, not the difference that a call made: a second call reports the same.
    """

    model: str
    replaced: dict[str, list[str]] = field(default_factory=dict)
    """Names of the replaced modules, by kind."""
    left: dict[str, str] = field(default_factory=dict)
    """By name, why a module that might have been replaced was not."""

    @property
    def num_replaced(self) -> int:
        return sum(map(len, self.replaced.values()))

    def include(self, prefix: str, model: nn.Module, left: dict[str, str]) -> None:
        """Add what is replaced in a model now, and what was left in it; `prefix` comes before its names."""
        for name, module in model.named_modules():
            if isinstance(module, Fused):
                self.replaced.setdefault(module.label, []).append(prefix + name or "the model itself")
        self.left.update({prefix + name: reason for name, reason in left.items()})

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.num_replaced} modules replaced, {len(self.left)} left"]
        lines += [f"  {len(names):4d} {kind}: {_some(names)}" for kind, names in self.replaced.items()]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"  {len(names):4d} left, {reason}: {_some(names)}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def _some(names: list[str], most: int = 3) -> str:
    """Name the first few; `replaced` and `left` have them all."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
