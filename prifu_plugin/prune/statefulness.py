"""Whether a forward remembers earlier calls, which no graph of one call can."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor, nn

from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.prune.inputs import Inputs
from prifu_plugin.prune.quiet import Quiet
from prifu_plugin.prune.verify import difference

_ROUNDING = 1e-6
"""What threads that add in another order may change."""


def check_stateless(model: nn.Module, inputs: Inputs) -> list[tuple[str, str]]:
    """Raise CaptureError if the same inputs give something else the second time.

    Args:
        model: in eval mode; what two calls leave on it is undone.
        inputs: what it takes.

    Returns:
        A note if its forward stores something on it, which no graph does.
    """
    try:
        first, second, stored = _called_twice(model, inputs.batch(1))
    except Exception:  # noqa: BLE001 - it takes no batch of 1
        first, second, stored = _called_twice(model, inputs)
    if difference(first, second) > _ROUNDING:
        raise CaptureError(
            f"The forward of {type(model).__name__} gives something else when it is called again "
            "with the same inputs: it remembers, or draws at random. What it does outside of its "
            "submodules stays Python."
        )
    if not stored:
        return []
    names = ", ".join(f"'{name}'" for name in stored[:5]) + ", ..." * (len(stored) > 5)
    return [(type(model).__name__, f"its forward stores {names}, which the pruned one does not")]


def _called_twice(model: nn.Module, inputs: Inputs) -> tuple[Any, Any, list[str]]:
    given = inputs.draw(model, 0)
    # A GraphModule prints where it stopped.
    printed = contextlib.redirect_stderr(io.StringIO())
    with printed, undisturbed(model), torch.no_grad(), Quiet(model):
        before = _state(model)
        first, second = (model(*[x.clone() for x in given]) for _ in range(2))
        after = _state(model)
    return first, second, [name for name, held in after.items() if before.get(name) != held]


def _state(model: nn.Module) -> dict[str, Any]:
    """Return what tells whether an attribute or buffer was written: who it is, its version."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        for name, value in {**own, **module._buffers}.items():
            place = f"{path}.{name}" if path else name
            if isinstance(value, Tensor):
                found[place] = id(value), 0 if value.is_inference() else value._version
            elif isinstance(value, bool | int | float | str):
                found[place] = value
    return found
