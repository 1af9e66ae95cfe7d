"""What is known of every tensor: which channels are constant, and which are needed.

A fact is kept per channel, not per element: a tensor's channel dimensions are its axes, all
other dimensions (batch, space, tokens) are summarized. A channel counts as constant only if it
has one known value over all of them, so that it can be filled in at any resolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Fact:
    """What is known of one tensor.

    Attributes:
        shape: its shape in the analysed run.
        axes: its channel dimensions.
        const: fp64, size 1 in all other dimensions; NaN = depends on the input ("live").
            For a static tensor: all its values.
        static: computed from parameters alone, so that it stays live code.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    const: Tensor
    static: bool = False

    @property
    def live(self) -> Tensor:
        """Mask, shaped like const: depends on the input."""
        return torch.isnan(self.const)

    @property
    def known(self) -> Tensor:
        """The constants, with 0 where live."""
        return torch.where(self.live, 0.0, self.const)

    def summary_shape(self) -> tuple[int, ...]:
        """Return the shape of masks over this tensor's channels."""
        return tuple(self.const.shape)


def live_everywhere(shape: tuple[int, ...], axes: tuple[int, ...] = ()) -> Fact:
    """Return the fact that nothing is known, which is always sound."""
    summary = [size if dim in axes else 1 for dim, size in enumerate(shape)]
    return Fact(shape, axes, torch.full(summary, float("nan"), dtype=torch.float64))


def summarize(values: Tensor, shape: tuple[int, ...], axes: tuple[int, ...]) -> Fact:
    """Reduce values (NaN = live), broadcastable to shape, to one value per channel.

    A channel that is constant but not the same everywhere becomes live: sound, and it can then
    be computed at any resolution. So does one that is infinite, which no weight can stand in for.
    """
    values = torch.where(torch.isinf(values), torch.nan, values)
    for dim in range(len(shape)):
        if dim in axes:
            continue
        first = values.narrow(dim, 0, 1)
        same = ((values - first).abs() <= 1e-12 * (1 + first.abs())).all(dim, keepdim=True)
        values = torch.where(same, first, torch.nan)
    summary = [size if dim in axes else 1 for dim, size in enumerate(shape)]
    return Fact(shape, axes, values.expand(summary).clone())


def first_channel(fact: Fact) -> Tensor:
    """Return a mask over a tensor's channels with the first one set."""
    mask = torch.zeros(fact.summary_shape(), dtype=torch.bool)
    mask.view(-1)[0] = True
    return mask


def channels_of(mask: Tensor, dim: int) -> Tensor:
    """Return for which channels a mask holds anywhere, (C,).

    Example:
        >>> channels_of(torch.tensor([[True, False], [False, False]]), 1).tolist()
        [True, False]
    """
    return mask.movedim(dim, 0).reshape(mask.shape[dim], -1).any(1)


def any_over(mask: Tensor, like: Fact) -> Tensor:
    """Reduce a mask, broadcastable to the tensor, to its channels: true if true anywhere."""
    for dim, size in enumerate(like.summary_shape()):
        if size == 1 and mask.shape[dim] != 1:
            mask = mask.any(dim, keepdim=True)
    return mask.expand(like.summary_shape())


def tensor_inputs(node: fx.Node, facts: dict[fx.Node, Any]) -> Iterator[fx.Node]:
    """Yield the inputs of a node that are tensors, or tuples of them, each once."""
    for source in node.all_input_nodes:
        value = facts.get(source)
        if isinstance(value, Fact) or is_fact_tuple(value):
            yield source


def is_fact_tuple(value: Any) -> bool:
    """Whether a value is a tuple or list of facts, as chunk and unbind return."""
    return isinstance(value, tuple) and bool(value) and all(isinstance(v, Fact) for v in value)
