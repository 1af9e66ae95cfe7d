"""Pictures of relevance: W against AvgRI by rank, influence on pixels, input channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prifu_plugin.figures import new_figure
from prifu_plugin.relevance import LayerRelevance, Relevance


def plot_ranks(layer: LayerRelevance, axes: Any = None) -> tuple[Any, Any]:
    """Draw W over channels in the order of their AvgRI, both relative to their largest (Fig. 6).

    Args:
        layer: from `prifu_plugin.relevance`.
        axes: matplotlib axes to draw on; None makes a new figure.

    Returns:
        The figure and its axes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    axes = axes or new_figure(7, 3).subplots()
    order = layer.avgri.argsort(descending=True)
    places = range(len(order))
    axes.bar(places, _relative(layer.avgri)[order].tolist(), color="#d8dee9", label="AvgRI")
    axes.plot(places, _relative(layer.weight)[order].tolist(), ".", color="#2e6f95", label="W")
    axes.set(
        xlabel="channels by AvgRI",
        ylabel="relative to the largest",
        title=f"{layer.path}: rank correlation {layer.correlation:.2f}",
    )
    axes.legend(frameon=False)
    return axes.figure, axes


def plot_inputs(
    found: Relevance, names: Sequence[str] | None = None, axes: Any = None
) -> tuple[Any, Any]:
    """Draw AvgRI of the input channels (Fig. 7).

    Args:
        found: from `prifu_plugin.relevance`.
        names: of the channels.
        axes: matplotlib axes to draw on; None makes a new figure.

    Returns:
        The figure and its axes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    axes = axes or new_figure(4, 3).subplots()
    places = list(range(len(found.inputs)))
    axes.bar(places, found.inputs.tolist(), color="#2e6f95")
    axes.set_xticks(places, list(names or map(str, places)), rotation=30 if names else 0)
    axes.set(ylabel="AvgRI on the loss", title="Input channels")
    return axes.figure, axes


def plot_influence(images: Tensor, maps: Tensor) -> tuple[Any, Any]:
    """Draw images above the influence of their pixels on the loss (Fig. 4).

    Args:
        images: (N, 3, H, W) in [0, 1].
        maps: from `prifu_plugin.influence`, (N, C, H, W).

    Returns:
        The figure and its axes, (2, N).

    Raises:
        ImportError: if matplotlib is missing.
    """
    grid = new_figure(1.6 * len(images), 3.4).subplots(2, len(images), squeeze=False)
    for column, (image, influence) in enumerate(zip(images, maps, strict=True)):
        grid[0, column].imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy())
        grid[1, column].imshow(_relative(influence.sum(0)).cpu().numpy(), cmap="magma")
        grid[0, column].axis("off")
        grid[1, column].axis("off")
    return grid[0, 0].figure, grid


def _relative(values: Tensor) -> Tensor:
    return values / values.max().clamp_min(torch.finfo(values.dtype).tiny)
