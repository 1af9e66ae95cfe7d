"""Batch norms called as functions become layers, so that they are sliced like layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prifu_plugin.graph.capture import Captured
from prifu_plugin.prune.functional_layers import can_be_taken_over, put_beside
from prifu_plugin.prune.seen import seen

_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""By the number of dimensions of the input."""


def make_norms(captured: Captured) -> bool:
    """Replace batch norms by layers, in place; returns whether there were any.

    Those with statistics, and scale and shift or neither, that are parameters or buffers.

    Args:
        captured: a model, whose children the layers become, and a graph with recorded examples.
    """
    found = False
    for node in list(captured.graph.nodes):
        given = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
        if node.target is not F.batch_norm or not _is_a_layers(captured.root, node, given):
            continue
        path = put_beside(captured.root, node, _layer(given))
        captured.notes.append((path, _LAYER))
        with captured.graph.inserting_before(node):
            called = captured.graph.call_module(path, (given["input"],))
        node.replace_all_uses_with(called)
        captured.graph.erase_node(node)
        found = True
    return found


_LAYER = (
    "a function that is a BatchNorm layer in the pruned model: call eval() on that to train with "
    "the statistics as they are"
)


def _is_a_layers(root: nn.Module, node: fx.Node, given: dict[str, Any]) -> bool:
    numbers = [given.get(name, 0.0) for name in ("momentum", "eps")]
    if given.get("training", False) is not False or any(isinstance(n, fx.Node) for n in numbers):
        return False
    affine = [given.get(name) for name in ("weight", "bias")]
    parts = [given.get("running_mean"), given.get("running_var")]
    parts += [] if affine == [None, None] else affine
    read = all(isinstance(part, fx.Node) and part.op == "get_attr" for part in parts)
    known = read and all(can_be_taken_over(root, part, node) for part in parts)
    return known and len(seen(given["input"]).shape) in _LAYERS


def _layer(given: dict[str, Any]) -> nn.Module:
    mean: Tensor = seen(given["running_mean"]).static
    settings = {name: given[name] for name in ("momentum", "eps") if name in given}
    affine = given.get("weight") is not None
    made = _LAYERS[len(seen(given["input"]).shape)]
    with torch.device("meta"):
        layer: Any = made(len(mean), affine=affine, **settings)
    for name in ("running_mean", "running_var"):
        setattr(layer, name, seen(given[name]).static.detach().clone())
    layer.num_batches_tracked = torch.tensor(0)
    for name in ("weight", "bias") if affine else ():
        value: Tensor = seen(given[name]).static
        setattr(layer, name, nn.Parameter(value.detach().clone(), value.requires_grad))
    layer.eval()
    return layer  # type: ignore[no-any-return]
