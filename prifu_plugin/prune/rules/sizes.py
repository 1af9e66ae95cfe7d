"""Operations that are given the sizes of their result: view, reshape, expand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from prifu_plugin.prune.nodes import SIZED, mapped, size_arguments
from prifu_plugin.prune.rules.base import Analysis, run
from prifu_plugin.prune.seen import seen


def patched_sizes(
    analysis: Analysis, node: fx.Node, counts: dict[int, int]
) -> tuple[tuple[int, int], ...]:
    """Return the size arguments that change: those of dimensions that shrink, except -1."""
    if node.target not in SIZED and node.target is not torch.reshape:
        return ()
    shape = seen(node).shape
    given = size_arguments(node)
    patched = []
    for dim, count in sorted(counts.items()):
        value = mapped(given[dim], lambda n: analysis.values[n])
        if value != -1 and count != shape[dim]:
            patched.append((dim, count))
    return tuple(patched)


def resized(
    analysis: Analysis,
    node: fx.Node,
    source: fx.Node,
    values: Tensor,
    sizes: tuple[tuple[int, int], ...],
) -> Tensor:
    """Run an operation on other values, with some of the sizes it is given changed."""

    def replace(n: fx.Node) -> Any:
        return values if n is source else analysis.values[n]

    if not sizes and node.target not in SIZED:
        result = run(analysis, node, replace)
    else:
        given = [mapped(size, replace) for size in size_arguments(node)]
        for dim, count in sizes:
            given[dim] = count
        method = "reshape" if node.target is torch.reshape else str(node.target)
        result = getattr(values, method)(*given)
    assert isinstance(result, Tensor)
    return result
