"""Forward hooks, which a pruned model does not have: taken off the copies, and named."""

from __future__ import annotations

from torch import nn

from prifu_plugin.filter import PriFU
from prifu_plugin.graph.state import remember_inputs

LOST = "its forward hooks are not in the pruned model"
"""The note of a module that had some."""


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody has put a forward hook on a module; our own do not count."""
    before = [hook for hook in module._forward_pre_hooks.values() if hook is not remember_inputs]
    return bool(before or module._forward_hooks) and not isinstance(module, PriFU)


def take_off(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Take the hooks of a model itself off, in place, and return the note of it if it had some.

    A trace begins inside them. Those of containers inside are traced with them.
    """
    notes = (("the model", LOST),) if has_hooks(model) else ()
    model._forward_hooks.clear()
    model._forward_pre_hooks.clear()
    model._forward_pre_hooks_with_kwargs.clear()
    return notes
