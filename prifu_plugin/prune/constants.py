"""Tensors that a forward makes of numbers, in fp64: tracing keeps what it made in fp32.

The reference of the certificate runs the forward in fp64, where it makes them anew.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.capture import CONSTANT, Captured
from prifu_plugin.prune.precise import in_fp64, raised


def made_in_fp64(captured: Captured, again: Callable[[nn.Module], Captured]) -> dict[str, Tensor]:
    """Return the floats that a forward made while it was traced, by name, in fp64.

    Args:
        captured: the graph; its model is not changed.
        again: traces a copy of the model.
    """
    kept = _constants(captured.root, captured.graph)
    if not any(value.is_floating_point() for _, value in kept):
        return {}
    try:
        with raised():
            twin = again(in_fp64(captured.root))
    except CaptureError:  # it casts inside, and then is compared as its graph computes it
        return {}
    found = _constants(twin.root, twin.graph)
    if len(found) != len(kept):
        return {}
    pairs = zip(kept, (value for _, value in found), strict=True)
    return {name: value.double() for (name, old), value in pairs if _are_alike(old, value)}


def _constants(root: nn.Module, graph: fx.Graph) -> list[tuple[str, Tensor]]:
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    return [(name, getattr(root, name)) for name in names if name.startswith(CONSTANT)]


def _are_alike(old: Tensor, new: Tensor) -> bool:
    """Whether a tensor is another one but for rounding; floats alone."""
    if not (old.is_floating_point() and new.is_floating_point()) or old.shape != new.shape:
        return False
    return torch.allclose(old.double(), new.double(), rtol=1e-2, atol=1e-3, equal_nan=True)
