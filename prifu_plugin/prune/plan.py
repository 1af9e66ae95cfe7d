"""The vocabulary of a plan: what prune decided, as an immutable value that JSON can hold.

A plan says for every node of the captured graph whether it exists in the pruned model, with
which channels, how its operands get there and how the operation itself is rewritten. Rewriting
carries it out and decides nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from prifu_plugin.formats import FORMAT, read_format, reading
from prifu_plugin.prune.layout import Conform

Notes = tuple[tuple[str, str], ...]
"""Places, and what is to be said of them."""


@dataclass(frozen=True)
class Keep:
    """The same operation on the conformed operands.

    Attributes:
        sizes: position of a size argument -> the size it has in the pruned model.
    """

    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Alias:
    """No operation: an operand, conformed, is the result.

    Attributes:
        source: the node that is the operand.
    """

    source: str


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer, sliced: dimension -> indices."""

    select: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class SliceLinear:
    """A linear map (Linear, convolution) with fewer rows and columns.

    Attributes:
        rows: original output channels in physical order; FILL is a row of zeros.
        columns: for each row group, original input indices within the group; FILL is a zero
            column.
        groups: number of groups.
        zero_rows: positions of rows whose result is a constant, held by the bias.
        bias: name of the constant that replaces the bias, "" to slice the original one.
        delta: name of the constant that is added to the weight, for carriers.
        border: name of the kernel whose response to ones is added to the result: constants that
            are missing meet a zero-padded border.
        pick: positions of the results that go on, empty for all.
    """

    rows: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...]
    groups: int
    zero_rows: tuple[int, ...] = ()
    bias: str = ""
    delta: str = ""
    border: str = ""
    pick: tuple[int, ...] = ()


@dataclass(frozen=True)
class SliceNorm:
    """A normalization with running statistics on fewer channels, the filter folded in."""

    channels: tuple[int, ...] | None


@dataclass(frozen=True)
class SelectNorm:
    """A normalization that needs all of its inputs, the filter folded in or following it.

    Attributes:
        dim: channel dimension.
        channels: open channels that go on, None for all.
        folded: the scale is in the affine parameters; otherwise it is a product behind them.
        shifted: a bias follows the product.
        inputs: channels of the groups that are left, None for all.
        groups: how many groups are left, 0 if it has none.
    """

    dim: int
    channels: tuple[int, ...] | None
    folded: bool
    shifted: bool = False
    inputs: tuple[int, ...] | None = None
    groups: int = 0


@dataclass(frozen=True)
class Scale:
    """A filter that stands alone: scale, shift and perhaps noise, per channel.

    Attributes:
        dim: of the channels.
        channels: that exist, None for all.
        shifted: a shift follows the product.
        noisy: noise follows.
        finest: the least deviation of noise that is drawn with a secret key, which is no part of
            the plan; None for noise that is drawn anew.
    """

    dim: int
    channels: tuple[int, ...] | None
    shifted: bool
    noisy: bool
    finest: float | None = None


@dataclass(frozen=True)
class Concat:
    """A concatenation of the parts that exist: their places in the original list."""

    dim: int
    parts: tuple[int, ...]


Kernel = Keep | Alias | Parameter | SliceLinear | SliceNorm | SelectNorm | Scale | Concat
_KERNELS = {cls.__name__: cls for cls in Kernel.__args__}


@dataclass(frozen=True)
class NodePlan:
    """What becomes of one node of the captured graph.

    Attributes:
        name: the node.
        kernel: how its operation is rewritten.
        operands: input node -> how it is conformed; inputs not listed are used as they are.
        layout: channel dimension -> original indices that exist, for each output if several.
    """

    name: str
    kernel: Kernel
    operands: tuple[tuple[str, Conform], ...] = ()
    layout: tuple[tuple[int, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Plan:
    """The plan for a whole model; nodes that are not listed do not exist in the result.

    Attributes:
        nodes: in the order of the captured graph.
        recipe: how the model was wrapped, so that a fresh one can be wrapped alike.
        constants: values that kernels and operands name, fp64.
        shapes: the shapes of the constants.
        notes: what was kept for want of a rule, and what training would miss: (node, reason).
    """

    nodes: tuple[NodePlan, ...]
    recipe: dict[str, Any]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: Notes = ()
    constants: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to_json(self) -> str:
        """Return the plan as JSON text, without the values of its constants."""
        nodes = [
            {
                "name": node.name,
                "kernel": _fields(node.kernel) | {"kind": type(node.kernel).__name__},
                "operands": [[name, _fields(c)] for name, c in node.operands],
                "layout": node.layout,
            }
            for node in self.nodes
        ]
        return json.dumps(
            {
                "format": FORMAT,
                "recipe": self.recipe,
                "nodes": nodes,
                "shapes": self.shapes,
                "notes": self.notes,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; raises ConfigError for anything else."""
        data = read_format(text, "plan", ("recipe", "nodes", "shapes", "notes"))
        with reading("plan"):
            nodes = tuple(_node_plan(item) for item in data["nodes"])
            shapes = {name: tuple(shape) for name, shape in data["shapes"].items()}
            return cls(nodes, data["recipe"], shapes, _frozen(data["notes"]))


def _node_plan(item: dict[str, Any]) -> NodePlan:
    fields = _frozen(item["kernel"])
    if fields.pop("keyed", False):  # as plans said before they told how fine the noise is
        fields["finest"] = math.inf
    kernel = _KERNELS[fields.pop("kind")](**fields)
    operands = tuple((name, Conform(**_frozen(c))) for name, c in item["operands"])
    return NodePlan(item["name"], kernel, operands, _frozen(item["layout"]))


def _fields(value: Kernel | Conform) -> dict[str, Any]:
    # Not asdict, which copies every index of every tuple.
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _frozen(value: Any) -> Any:
    """Turn JSON's lists into tuples, all the way down."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return value
