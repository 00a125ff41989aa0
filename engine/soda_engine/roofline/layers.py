"""Which module of a model is at work: in the forward by hooks, in the backward by the numbers of autograd's nodes."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Layers:
    """A context in which `current` tells the path of the module whose op runs, also of ops in the backward.

    A node of autograd's graph carries a number from one counter, and so belongs to the module that ran when the counter
    stood there. What a checkpoint computes again in the backward counts for the module that computes it.

    Args:
        model: whose modules are told apart; "" is the model itself, and whatever belongs to none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._running: list[str] = []
        self._starts: list[int] = []
        self._paths: list[str] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for path, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(lambda *_, path=path: self._begin(path)))
            self._handles.append(module.register_forward_hook(lambda *_: self._end(), always_call=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def current(self) -> str:
        """The path of the module at work."""
        if self._running:
            return self._running[-1]
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return ""
        index = bisect_right(self._starts, node._sequence_nr()) - 1
        # What adds up a weight's gradients has the largest number there is, and follows the last module.
        return self._paths[index] if 0 <= index < len(self._paths) - 1 else ""

    @property
    def is_forward(self) -> bool:
        """Whether a module's forward runs."""
        return bool(self._running)

    def _begin(self, path: str) -> None:
        self._running.append(path)
        self._mark()

    def _end(self) -> None:
        self._running.pop()
        self._mark()

    def _mark(self) -> None:
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._paths.append(self._running[-1] if self._running else "")
