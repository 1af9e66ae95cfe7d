"""Turn facts into a plan: the passes over the graph, and what rules use to add to the plan."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from prifu_plugin.filter import along
from prifu_plugin.graph.guards import is_guard
from prifu_plugin.prune.agreement import Agreement, until_agreed
from prifu_plugin.prune.facts import Fact, channels_of, first_channel, tensor_inputs
from prifu_plugin.prune.layout import FILL, Conform, Layout, box, physical, restrict, simplify
from prifu_plugin.prune.plan import Keep, Kernel, NodePlan, Plan
from prifu_plugin.prune.seen import seen

if TYPE_CHECKING:
    from prifu_plugin.prune.rules.base import Analysis


WHOLE = 2**30
"""A round_to that no width reaches: all channels stay, but for tensors that are dead as a whole."""


class Planner:
    """The plan while it is being made.

    Attributes:
        analysis: the facts it stands on.
        layouts: planned node -> its layout.
        plans: planned node -> its plan.
        constants: name -> value.
        decided: layer -> the order of channels that its calls share.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.layouts: dict[fx.Node, Layout] = {}
        self.plans: dict[fx.Node, NodePlan] = {}
        self.constants: dict[str, Tensor] = {}
        self.decided: dict[Hashable, tuple[int, ...]] = {}

    def exists(self, node: fx.Node) -> bool:
        """Whether a node has physical channels."""
        return node in self.layouts

    def emit(
        self,
        node: fx.Node,
        kernel: Kernel,
        operands: Mapping[fx.Node, Conform] | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Plan a node."""
        fact = self.analysis.values[node]
        layout = simplify(fact.shape, layout or {}) if isinstance(fact, Fact) else layout or {}
        self.layouts[node] = layout
        self.plans[node] = NodePlan(
            node.name,
            kernel,
            tuple((n.name, c) for n, c in (operands or {}).items() if not c.is_identity),
            tuple(sorted(layout.items())),
        )

    def constant(self, name: str, value: Tensor) -> str:
        """Record a constant and return its name; another one for another value."""
        found = self.constants.get(name)
        if found is not None and not torch.equal(found, value):
            return self.constant(f"{name}_", value)
        self.constants[name] = value.detach().clone()
        return name

    def agreed(self, node: fx.Node, decide: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """Return what was decided for the first call of a node's layer."""
        key = self.analysis.layer_key(node)
        if key not in self.decided:
            self.decided[key] = decide()
        return self.decided[key]

    def physical(self, node: fx.Node, dim: int) -> tuple[int, ...]:
        """Return the original indices that exist of a node along a dimension."""
        return physical(self.analysis.fact(node), self.layouts[node], dim)

    def kept(self, node: fx.Node) -> dict[int, tuple[int, ...]] | None:
        """Return the channels of a node that are to exist, None if there are none."""
        keep = self.analysis.keep[node]
        return box(keep, self.analysis.fact(node).axes) if keep.any() else None

    def in_order_of(
        self, source: fx.Node, wanted: dict[int, tuple[int, ...]]
    ) -> dict[int, tuple[int, ...]]:
        """Order the wanted channels as a source has them, so that no gather is needed."""
        if not self.exists(source):
            return wanted
        ordered = {}
        for dim, kept in wanted.items():
            asked = set(kept)
            first = [index for index in self.physical(source, dim) if index in asked]
            there = set(first)
            ordered[dim] = tuple(first + [index for index in kept if index not in there])
        return ordered

    def as_it_comes(
        self, source: fx.Node, wanted: dict[int, tuple[int, ...]], shift: int = 0
    ) -> dict[int, tuple[int, ...]]:
        """Take all channels that a source has, where copies are dear and that saves a selection.

        Args:
            source: an operand that exists.
            wanted: what is to exist of the result.
            shift: by how many dimensions the result has more, on the left.
        """
        if not self.analysis.move_cost or not self.exists(source):
            return wanted
        taken = {}
        for dim, kept in wanted.items():
            there: tuple[int, ...] = ()
            if dim >= shift and self.analysis.fact(source).shape[dim - shift] > 1:
                there = self.physical(source, dim - shift)
            taken[dim] = there if set(kept) < set(there) else kept
        return taken

    def conform(self, source: fx.Node, reader: fx.Node, wanted: Layout | None = None) -> Conform:
        """Plan how a reader gets a source in the layout it wants; whole where none is given.

        What is missing is filled from the constants. A live channel can be missing only where
        the reader does not use its value, so 0 stands in for it.
        """
        wanted = dict(wanted or {})
        fact = self.analysis.fact(source)
        name = f"{reader.name}__{source.name}"
        for axis in fact.axes:
            wanted.setdefault(axis, tuple(range(fact.shape[axis])))
        wanted = {dim: kept for dim, kept in wanted.items() if fact.shape[dim] != 1}
        if not self.exists(source):
            return Conform(constant=self.constant(name, restrict(fact.known, wanted)))
        select = {}
        missing = torch.zeros([1] * len(fact.shape), dtype=torch.bool)
        for dim, kept in sorted(wanted.items()):
            have = self.physical(source, dim)
            where = {index: position for position, index in enumerate(have)}
            positions = tuple(where.get(index, FILL) for index in kept)
            if positions == tuple(range(len(have))):
                continue
            select[dim] = positions
            line = torch.tensor(positions) == FILL
            missing = missing | along(line, missing.ndim, dim)
        vector = restrict(fact.known, wanted) * missing if missing.any() else missing
        if vector.any():
            return Conform(tuple(select.items()), vector=self.constant(name, vector))
        return Conform(tuple(select.items()))


def make_plan(
    analysis: Analysis, recipe: dict[str, Any], round_to: int = 1, move_cost: float = 0.0
) -> Plan:
    """Run the two backward passes and the forward one that make a plan of facts.

    Args:
        analysis: with values and rules filled in.
        recipe: how the model was wrapped.
        round_to: widths become multiples of it, with dead channels that stay.
        move_cost: multiply-accumulates that moving one value is taken to cost.

    Returns:
        The plan.
    """
    analysis.move_cost = move_cost
    for node in analysis.graph.nodes:
        key = analysis.layer_key(node)
        if key is not None:
            analysis.calls.setdefault(key, []).append(node)
    until_agreed(analysis, lambda agreement: _find_need(analysis, agreement))
    until_agreed(analysis, lambda agreement: _find_keep(analysis, round_to, agreement))
    planner = Planner(analysis)
    for node in analysis.graph.nodes:
        if node.op == "output":
            _plan_output(planner, node)
        elif node not in planner.plans:
            analysis.rules[node].plan(planner)
    order = [planner.plans[node] for node in analysis.graph.nodes if node in planner.plans]
    return Plan(
        tuple(order),
        recipe,
        {name: tuple(value.shape) for name, value in planner.constants.items()},
        tuple(analysis.notes),
        planner.constants,
    )


def _plan_output(planner: Planner, node: fx.Node) -> None:
    """Give the model's outputs all of their channels, in the original order."""
    values = planner.analysis.values
    operands = {
        source: planner.conform(source, node)
        for source in tensor_inputs(node, values)
        if isinstance(values[source], Fact) and not planner.analysis.fact(source).static
    }
    changed = tuple((s.name, c) for s, c in operands.items() if not c.is_identity)
    planner.plans[node] = NodePlan(node.name, Keep(), changed)


def _find_need(analysis: Analysis, agreement: Agreement) -> None:
    """Pass need from the output to the inputs, through live results only."""
    masks: dict[Any, Tensor] = {}
    for node in reversed(analysis.graph.nodes):
        if node.op == "output":
            for source in tensor_inputs(node, analysis.values):
                _merge_all(analysis, masks, source)
            continue
        value = analysis.values.get(node)
        if isinstance(value, Fact):
            none = torch.zeros(value.summary_shape(), dtype=torch.bool)
            live = masks.get(node, none) & value.live
            analysis.need[node] = masks.get(node, none) | agreement.join(node, live)
        if node in analysis.rules:
            for source, mask in analysis.rules[node].need(analysis).items():
                masks[source] = masks[source] | mask if source in masks else mask


def _find_keep(analysis: Analysis, round_to: int, agreement: Agreement) -> None:
    """Decide what exists: what is live and needed, what an output must show, what is wanted."""
    wants = analysis.wants
    exists: set[fx.Node] = set()
    for node in reversed(analysis.graph.nodes):
        if node.op == "output":
            exists.add(node)
            _ask_for_outputs(analysis, node)
            continue
        read = is_guard(node) or any(user in exists for user in node.users)
        value = analysis.values.get(node)
        if not isinstance(value, Fact):
            if read:
                exists.add(node)
                _pass_wants(analysis, node)
            continue
        keep = analysis.wanted(node) | wants.get(node, torch.tensor(False))
        sized = any(user in exists and seen(user).shape == () for user in node.users)
        if sized and not keep.any():
            keep = first_channel(value)
        if analysis.move_cost:
            keep = analysis.rules[node].spare(analysis, keep) if node in analysis.rules else keep
        keep = agreement.join(node, _aligned(analysis, node, keep, round_to))
        analysis.keep[node] = keep
        if not keep.any() and not (value.static and read):
            continue
        exists.add(node)
        if not value.static:
            _pass_wants(analysis, node)


def _ask_for_outputs(analysis: Analysis, node: fx.Node) -> None:
    """Ask for what varies of the outputs, to fill in the rest; for all where copies are dear."""
    wants = analysis.wants
    for source in tensor_inputs(node, analysis.values):
        value = analysis.values[source]
        if analysis.move_cost or not isinstance(value, Fact) or value.static:
            _merge_all(analysis, wants, source)
        else:
            live = analysis.wanted(source)
            asked = live if live.any() else first_channel(value)
            wants[source] = wants.get(source, torch.tensor(False)) | asked


def _pass_wants(analysis: Analysis, node: fx.Node) -> None:
    """Pass a node's wants to its inputs; one of them must exist, for the shape."""
    wants = analysis.wants
    for source, mask in analysis.rules[node].want(analysis).items():
        wants[source] = wants[source] | mask if source in wants else mask
    sources = [s for s in analysis.rules[node].sources(analysis) if not analysis.fact(s).static]
    there = [analysis.wanted(s) | wants.get(s, torch.tensor(False)) for s in sources]
    if sources and not any(mask.any() for mask in there):
        wants[sources[0]] = first_channel(analysis.fact(sources[0]))


def _aligned(analysis: Analysis, node: fx.Node, keep: Tensor, round_to: int) -> Tensor:
    """Keep some dead channels of what a linear map reads, up to a multiple of round_to."""
    if round_to >= WHOLE:
        return torch.full_like(keep, bool(keep.any()))
    fact = analysis.fact(node)
    asked = [analysis.rules[u].aligned_dim(node) for u in node.users if u in analysis.rules]
    dims = {dim for dim in asked if dim is not None}
    if round_to == 1 or not keep.any() or len(dims) != 1 or not dims <= set(fact.axes):
        return keep
    dim = dims.pop()
    line = channels_of(keep, dim)
    spare = (~line).nonzero().flatten()
    there = _asked_of_source(analysis, node, dim)
    if there is not None:  # what another reader keeps is there anyway
        spare = torch.cat([spare[there[spare]], spare[~there[spare]]])
    spare = spare[: -int(line.sum()) % round_to]
    extra = torch.zeros_like(line)
    extra[spare] = True
    return keep | along(extra, keep.ndim, dim)


def _asked_of_source(analysis: Analysis, node: fx.Node, dim: int) -> Tensor | None:
    """Return which channels of a node's only source others ask for, if they are the same."""
    sources = analysis.rules[node].sources(analysis) if node in analysis.rules else []
    if len(sources) != 1 or sources[0] not in analysis.wants:
        return None
    there, shape = analysis.wants[sources[0]], analysis.fact(node).summary_shape()
    return channels_of(there, dim) if there.shape == shape else None


def _merge_all(analysis: Analysis, masks: dict[Any, Tensor], source: fx.Node) -> None:
    value = analysis.values[source]
    if isinstance(value, Fact):
        masks[source] = torch.ones(value.summary_shape(), dtype=torch.bool)
