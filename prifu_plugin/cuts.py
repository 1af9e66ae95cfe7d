"""Where a model can be cut: its graph, the node at a place, and what crosses a cut."""

from __future__ import annotations

import copy
import difflib
import warnings
from dataclasses import replace

from torch import fx, nn

from prifu_plugin.cut import CutFilter
from prifu_plugin.device import device_of
from prifu_plugin.errors import CaptureError, ConfigError, NoSiteError, PrifuWarning
from prifu_plugin.graph.capture import CONSTANT, Captured, capture
from prifu_plugin.graph.guards import fix_sizes, is_guard, is_refusal
from prifu_plugin.graph.host import filter_of, is_host
from prifu_plugin.graph.sized import capture_sized
from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.names import value_at
from prifu_plugin.prune.asleep import asleep
from prifu_plugin.prune.examples import record_examples
from prifu_plugin.prune.inputs import Inputs, refusal, suited, takes
from prifu_plugin.prune.lower import drop_unused, name_effects
from prifu_plugin.prune.places import PLACES, place
from prifu_plugin.prune.run import plan_of
from prifu_plugin.prune.seen import seen

OTHER = 5
"""Batch size of the second run: other sizes seldom change from 2 to 5, as the batch does."""


def captured_at(model: nn.Module, inputs: Inputs) -> Captured:
    """Capture a model in eval mode and record on its nodes what two runs give.

    Where torch.fx stops, the sizes of the example decide, under guards.

    Args:
        model: plain, wrapped or pruned; it is not changed.
        inputs: what it takes.

    Raises:
        ConfigError: if it does not take them.
        CaptureError: if it cannot be traced.
    """
    with undisturbed(model, keep=CONSTANT):
        model.eval()
        first, other = _runs(model, inputs)
        if isinstance(model, fx.GraphModule) and PLACES in model.meta:
            return _recorded(Captured(model, copy.deepcopy(model.graph)), first, other)
        try:
            return _recorded(capture(model, len(inputs.shapes)), first, other)
        except CaptureError:
            captured = capture_sized(model, first.draw(model, 0))
        try:
            return _recorded(captured, first, other)
        except AssertionError as error:  # it decides otherwise at the other size
            if not is_refusal(error):
                raise
        fix_sizes(captured.graph, first.shapes)
        try:
            return _recorded(captured, first, first.batch(OTHER))
        except AssertionError as error:
            if not is_refusal(error):
                raise
            raise CaptureError(
                f"{type(model).__name__} decides differently for each batch size, as a loop over "
                "the images of a batch does: it cannot be cut. Compute the batch as one tensor."
            ) from None


def _runs(model: nn.Module, inputs: Inputs) -> tuple[Inputs, Inputs]:
    first = suited(model, inputs.batch(2), inputs)
    if first is None:
        raise ConfigError(
            f"{type(model).__name__} refuses inputs of shape {list(inputs.shapes)}: "
            f"{refusal(model, inputs)}. Pass example_inputs= a batch as the model takes it."
        )
    inputs = replace(inputs, within=first.within)
    others = [*inputs.batch(OTHER).sized(), inputs.batch(OTHER)]
    return first, next((one for one in others if takes(model, one)), first)


def _recorded(captured: Captured, first: Inputs, other: Inputs) -> Captured:
    name_effects(captured.graph, captured.root)
    drop_unused(captured.graph)  # what nobody reads does not cross a cut
    if other is first:  # what is concluded of one size holds there
        fix_sizes(captured.graph, first.shapes, batch=True)
    device = device_of(captured.root)
    drawn = [[x.to(device) for x in run.draw(captured.root, 0)] for run in (first, other)]
    record_examples(captured.root, captured.graph, *drawn)
    return captured


def find(captured: Captured, model: nn.Module, at: str) -> fx.Node:
    """Return the node of a place: the last one that a module computes.

    Raises:
        NoSiteError: if there is none; the message names the closest.
    """
    features = getattr(model, "feature_info", None)
    names = {}
    for info in getattr(features, "info", features) or []:
        if isinstance(info, dict) and "module" in info:
            names[info["module"].rsplit(".", 1)[-1]] = info["module"]
    kept: dict[str, list[object]] = getattr(model, "meta", {}).get(PLACES, {})
    path = at if at in dict(model.named_modules()) or at in kept else names.get(at, at)
    found = place(captured.graph, kept, path)
    used = ancestors(next(iter(reversed(captured.graph.nodes))))
    for node in captured.graph.nodes if found is None else ():
        stack = node.meta.get("nn_module_stack") or {}
        inside = {str(entry[0]) for entry in stack.values()}
        called = node.op == "call_module" and node.target == path
        ends = path and path in inside and seen(node).shape and node in used
        if node.name == at or called or ends:
            found = node
    if found is None or found.op in ("placeholder", "output", "get_attr"):
        known = [p for p, _ in model.named_modules() if p and p != at] + points(captured.graph)
        close = difflib.get_close_matches(at, known, n=3, cutoff=0.3)
        raise NoSiteError(
            f"{type(model).__name__} computes nothing at '{at}'. Closest: "
            f"{', '.join(close) or 'none'}; "
            "prifu_plugin.cut_points(model, example_inputs) lists the graph's nodes."
        )
    return found


def on_edge(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    """Return what the edge computes: a node, all it is made of, and the guards of that."""
    found = ancestors(node)
    for guard in graph.nodes:
        if is_guard(guard):
            asked = ancestors(guard)
            if all(n in found or n.op == "placeholder" or not seen(n).shape for n in asked):
                found |= asked
    return found


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return a node and everything it is computed from."""
    found, open_nodes = {node}, [node]
    while open_nodes:
        for source in open_nodes.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                open_nodes.append(source)
    return found


def with_sizes(graph: fx.Graph, computed: set[fx.Node]) -> set[fx.Node]:
    """Add the sizes of what the edge computes, which the cloud may ask for."""
    known = set(computed)
    for node in graph.nodes:
        asks = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
        asks = asks and not seen(node).shape and not seen(node).nested
        if asks and all(source in known for source in node.all_input_nodes):
            known.add(node)
    return known


def is_free(node: fx.Node) -> bool:
    """Whether the cloud can compute a value by itself, from parameters alone."""
    return node.op == "get_attr" or (
        seen(node).is_static and all(map(is_free, node.all_input_nodes))
    )


def points(graph: fx.Graph) -> list[str]:
    """Return the names of the nodes at which one tensor is all that crosses."""
    found = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or not seen(node).shape:
            continue
        known = with_sizes(graph, on_edge(graph, node))
        sent = [n for n in crossing(graph, known) if seen(n).shape]
        last = any(user.op == "output" for user in node.users)
        if sent == [node] and not (last or seen(node).several or late_inputs(graph, known)):
            found.append(node.name)
    return found


def crossing(graph: fx.Graph, known: set[fx.Node]) -> list[fx.Node]:
    """Return what the edge knows and the cloud asks for: tensors and sizes."""
    return [
        n
        for n in graph.nodes
        if n in known and any(user not in known for user in n.users) and not is_free(n)
    ]


def late_inputs(graph: fx.Graph, known: set[fx.Node]) -> list[fx.Node]:
    """Return the inputs that are used behind the cut only."""
    return [n for n in graph.nodes if n.op == "placeholder" and n not in known and n.users]


def suggestion(graph: fx.Graph) -> str:
    """Name up to three places for a cut, close to the output."""
    return " or ".join(f"'{name}'" for name in points(graph)[-3:]) or "another place"


def warn_of_what_is_lost(
    model: nn.Module, graph: fx.Graph, node: fx.Node, computed: set[fx.Node]
) -> None:
    """Warn of a filter on the upload that is behind the cut, and of dropout that stays off."""
    behind = _filtered_behind(model, graph, computed)
    if behind is not None:
        warnings.warn(
            f"The filter on the upload, at '{behind}', is behind the cut at '{node.name}': what is "
            f"uploaded is neither filtered nor noisy. Cut at '{behind}'.",
            PrifuWarning,
            stacklevel=3,
        )
    notes = asleep(graph) if model.training else []
    if notes:
        warnings.warn(
            f"The parts are traced in eval mode: '{notes[0][0]}' is functional dropout, and drops "
            "nothing in them, in training neither; nn.Dropout modules do drop.",
            PrifuWarning,
            stacklevel=3,
        )


def _filtered_behind(model: nn.Module, graph: fx.Graph, computed: set[fx.Node]) -> str | None:
    """Return the path of a filter on the upload that the edge does not compute, None if it does."""
    for node in graph.nodes:
        if node.op == "call_module" and node not in computed:
            module = value_at(model, str(node.target))
            unit = filter_of(module) if is_host(module) else module
            if isinstance(unit, CutFilter):
                return str(node.target).removesuffix(".prifu")
    kept = getattr(model, "meta", {}).get(PLACES)
    if kept is None:
        return None
    cut = plan_of(model).recipe["cut"]  # of a pruned model, whose filter is folded
    node = None if cut is None else place(graph, kept, cut)
    return None if node is None or node in computed else str(cut)
