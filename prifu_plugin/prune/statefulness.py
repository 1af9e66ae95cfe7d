"""Whether a forward remembers earlier calls, which no graph of one call can."""

from __future__ import annotations

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
    given = inputs.draw(model, 0)
    with undisturbed(model), torch.no_grad(), Quiet(model):
        first, second = (model(*[x.clone() for x in given]) for _ in range(2))
    if difference(first, second) > _ROUNDING:
        raise CaptureError(
            f"The forward of {type(model).__name__} gives something else when it is called again "
            "with the same inputs: it remembers, or draws at random. What it does outside of its "
            "submodules stays Python."
        )
