"""Whether a forward remembers earlier calls, which no graph of one call can."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import nn

from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.prune.inputs import Inputs
from prifu_plugin.prune.quiet import Quiet
from prifu_plugin.prune.verify import difference

_ROUNDING = 1e-6
"""What threads that add in another order may change."""


def check_stateless(model: nn.Module, inputs: Inputs) -> None:
    """Raise CaptureError if the same inputs give something else the second time.

    Args:
        model: in eval mode; what two calls leave on it is undone.
        inputs: what it takes.
    """
    try:
        first, second = _called_twice(model, inputs.batch(1))
    except Exception:  # noqa: BLE001 - it takes no batch of 1
        first, second = _called_twice(model, inputs)
    if difference(first, second) > _ROUNDING:
        raise CaptureError(
            f"The forward of {type(model).__name__} gives something else when it is called again "
            "with the same inputs: it remembers, or draws at random. What it does outside of its "
            "submodules stays Python."
        )


def _called_twice(model: nn.Module, inputs: Inputs) -> tuple[Any, Any]:
    given = inputs.draw(model, 0)
    # A GraphModule prints where it stopped.
    printed = contextlib.redirect_stderr(io.StringIO())
    with printed, undisturbed(model), torch.no_grad(), Quiet(model):
        return model(*[x.clone() for x in given]), model(*[x.clone() for x in given])
