"""A table of a wrapped model's filters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from prifu_plugin.cut import CutFilter
from prifu_plugin.graph.functional import FilterGroup
from prifu_plugin.graph.insert import filters
from prifu_plugin.graph.norms import base_class
from prifu_plugin.graph.state import wrap_state
from prifu_plugin.graph.values import check_filters_present
from prifu_plugin.names import CHILD
from prifu_plugin.sharded import check_unsharded


@dataclass(frozen=True)
class FilterRow:
    """One filter.

    Attributes:
        path: what it follows.
        type: class of what it follows.
        channels: number of channels.
        open: how many pass.
        largest: largest W.
        dose: decay applied so far, the sum of lr * beta over the steps.
        is_cut: whether it stands on the uploaded tensor.
    """

    path: str
    type: str
    channels: int
    open: int
    largest: float
    dose: float
    is_cut: bool


@dataclass(frozen=True)
class Summary:
    """All filters of a model; prints as a table."""

    rows: tuple[FilterRow, ...]

    @property
    def channels(self) -> int:
        """Channels of all filters together."""
        return sum(row.channels for row in self.rows)

    @property
    def open(self) -> int:
        """Open channels of all filters together."""
        return sum(row.open for row in self.rows)

    @property
    def dead(self) -> tuple[str, ...]:
        """Paths of filters with no open channel."""
        return tuple(row.path for row in self.rows if row.open == 0)

    def __str__(self) -> str:
        width = max([4, *(len(row.path) for row in self.rows)])
        kind = max([4, *(len(row.type) for row in self.rows)])
        lines = [
            f"{'path':{width}}  {'type':{kind}}  {'channels':>8}  {'open':>5}  {'max W':>9}  dose"
        ]
        lines += [
            f"{row.path:{width}}  {row.type:{kind}}  {row.channels:8}  {row.open:5}  "
            f"{row.largest:9.3g}  {row.dose:.3g}" + ("  (cut)" if row.is_cut else "")
            for row in self.rows
        ]
        lines.append(f"{len(self.rows)} filters, {self.open} of {self.channels} channels open")
        if self.dead:
            lines.append("no channel open: " + ", ".join(self.dead))
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """List the filters of a wrapped model: channels, how many are open, dose so far.

    Args:
        model: a wrapped model.

    Raises:
        OrderError: if the model is not wrapped, or sharded over processes (`status` works there).
        FilterError: if a weight is not finite.

    Example:
        >>> import prifu_plugin as prifu
        >>> print(summary(prifu.wrap(nn.Sequential(nn.BatchNorm1d(2)))))
        path  type         channels   open      max W  dose
        0     BatchNorm1d         2      2        0.1  0
        1 filters, 2 of 2 channels open
    """
    wrap_state(model)
    check_filters_present(model)
    check_unsharded(model, "summary")
    rows = []
    for path, unit in filters(model).items():
        unit.check_finite()
        owner, _, call = path.rpartition(".")
        inner = model.get_submodule(owner)._modules.get(CHILD)
        functional = isinstance(inner, FilterGroup) and call in inner
        host = None if functional else model.get_submodule(path)
        rows.append(
            FilterRow(
                path,
                call if host is None else base_class(host).__name__,
                unit.weight.numel(),
                int(unit.open.sum()),
                float(unit.weight.detach().max()),
                unit.dose,
                host is not None and isinstance(host._modules[CHILD], CutFilter),
            )
        )
    return Summary(tuple(rows))
