"""What the cloud takes the sizes of the edge for, and guards on the edge that it is right.

A size that the edge knew and the cloud asks for is found by two runs: it is the same in both, or
that of a dimension of the upload. That is a claim; the edge checks it for every input.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from prifu_plugin.graph.guards import SPLIT_GUARD
from prifu_plugin.prune.seen import seen


@dataclass(frozen=True)
class Claim:
    """A value, or the size of an uploaded tensor.

    Attributes:
        value: if it is always the same.
        tensor: of which it is a size, or the device if there is no dim.
        dim: of that.
    """

    value: Any = None
    tensor: fx.Node | None = None
    dim: int | None = None


def claim_of(here: Any, there: Any, tensors: Sequence[fx.Node]) -> Claim | tuple[Any, ...] | None:
    """Return what a value of two runs may be taken for, None if nothing shows it.

    Args:
        here: in the one run.
        there: in the other.
        tensors: what is uploaded, with their shapes in both.
    """
    if isinstance(here, tuple | list) and isinstance(there, tuple | list):
        parts = [claim_of(a, b, tensors) for a, b in zip(here, there, strict=True)]
        return None if any(part is None for part in parts) else tuple(parts)
    if isinstance(here, torch.device):
        return Claim(tensor=tensors[0])
    if here == there:
        return Claim(here)
    for tensor in tensors:
        sizes = zip(seen(tensor).shape, seen(tensor).other_shape, strict=True)
        for dim, both in enumerate(sizes):
            if both == (here, there):
                return Claim(tensor=tensor, dim=dim)
    return None


def shown(graph: fx.Graph, claim: Any, copies: dict[fx.Node, Any]) -> Any:
    """Return the value of a claim in a graph that has copies of the tensors."""
    if isinstance(claim, tuple):
        return tuple(shown(graph, part, copies) for part in claim)
    if claim.tensor is None:
        return claim.value
    tensor = copies[claim.tensor]
    if claim.dim is None:
        return graph.call_function(getattr, (tensor, "device"))
    return graph.call_method("size", (tensor, claim.dim))


def guard(graph: fx.Graph, value: fx.Node, claim: Any, copies: dict[fx.Node, Any]) -> None:
    """Let a graph refuse inputs for which a claim does not hold."""
    if isinstance(claim, tuple):
        for at, part in enumerate(claim):
            guard(graph, graph.call_function(operator.getitem, (value, at)), part, copies)
    elif claim.tensor is None or claim.dim is not None:
        same = graph.call_function(operator.eq, (value, shown(graph, claim, copies)))
        graph.call_function(torch._assert, (same, SPLIT_GUARD))
