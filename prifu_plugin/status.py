"""What the filters of a model are doing, as plain dicts for any logger."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prifu_plugin.figures import new_figure
from prifu_plugin.graph.insert import filters
from prifu_plugin.graph.state import wrap_state
from prifu_plugin.graph.values import check_filters_present


def status(model: nn.Module) -> dict[str, float]:
    """Return a few numbers about a wrapped model's filters.

    Args:
        model: a wrapped model, in training or after.

    Returns:
        "open" and "channels" over all filters, "open share", "dead filters" (no channel open),
        "dose" (the largest so far), and "open/<path>" for each filter.

    Raises:
        OrderError: if the model is not wrapped.
        FilterError: if a weight is not finite.

    Example:
        >>> import prifu_plugin as prifu
        >>> status(prifu.wrap(nn.Sequential(nn.BatchNorm1d(4))))["open share"]
        1.0
    """
    wrap_state(model)
    check_filters_present(model)
    units = filters(model)
    for unit in units.values():
        unit.check_finite()
    opened = {path: int(unit.open.sum()) for path, unit in units.items()}
    channels = sum(unit.weight.numel() for unit in units.values())
    return {
        "open": sum(opened.values()),
        "channels": channels,
        "open share": sum(opened.values()) / channels,
        "dead filters": sum(count == 0 for count in opened.values()),
        "dose": max(unit.dose for unit in units.values()),
        **{f"open/{path}": count for path, count in opened.items()},
    }


class MaskHistory:
    """Masks over training: call `record` as often as is wanted.

    Args:
        model: a wrapped model; the history holds a reference to it.

    Example:
        >>> import prifu_plugin as prifu
        >>> model = prifu.wrap(nn.Sequential(nn.BatchNorm1d(4)))
        >>> history = MaskHistory(model)
        >>> prifu.filters(model)["0"].weight.data[0] = 0.0
        >>> history.record(step=1)["closed now"]
        1
    """

    def __init__(self, model: nn.Module) -> None:
        wrap_state(model)
        check_filters_present(model)
        self.model = model
        self.steps: list[int] = []
        self.masks: list[dict[str, Tensor]] = []
        self._last = self._open()

    def record(self, step: int) -> dict[str, float]:
        """Note the masks of a step.

        Args:
            step: of training.

        Returns:
            `status`, and "closed now" and "opened now" since the last record.
        """
        now = self._open()
        closed = sum(int((self._last[path] & ~mask).sum()) for path, mask in now.items())
        opened = sum(int((~self._last[path] & mask).sum()) for path, mask in now.items())
        self._last = now
        self.steps.append(step)
        self.masks.append(now)
        return {**status(self.model), "closed now": closed, "opened now": opened}

    def plot(self, axes: Any = None) -> tuple[Any, Any]:
        """Draw the share of open channels of every filter over the steps.

        Args:
            axes: matplotlib axes to draw on; None makes a new figure.

        Returns:
            The figure and its axes.

        Raises:
            ImportError: if matplotlib is missing.
        """
        if axes is None:
            axes = new_figure(8, 1.2 + 0.18 * len(self._last)).subplots()
        paths = list(self._last)
        shares = [[float(m[path].double().mean()) for m in self.masks] for path in paths]
        image = axes.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axes.set_yticks(range(len(paths)), paths, fontsize=6)
        shown = range(0, len(self.steps), max(1, len(self.steps) // 8))
        axes.set_xticks(list(shown), [str(self.steps[i]) for i in shown])
        axes.set(xlabel="step", title="Share of channels open")
        axes.figure.colorbar(image, ax=axes)
        return axes.figure, axes

    def _open(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {path: unit.open.cpu().clone() for path, unit in filters(self.model).items()}
