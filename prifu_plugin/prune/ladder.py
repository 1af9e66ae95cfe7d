"""From a model to a graph with examples: by torch.fx, or by the sizes of a run where needed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.capture import Captured
from prifu_plugin.graph.guards import fix_dims, fix_sizes, is_refusal
from prifu_plugin.graph.sized import looks_into
from prifu_plugin.prune.examples import record_examples
from prifu_plugin.prune.functional_layers import make_layers
from prifu_plugin.prune.functional_norms import make_norms
from prifu_plugin.prune.inputs import Inputs, takes
from prifu_plugin.prune.lower import drop_unused, lower
from prifu_plugin.prune.products import spell_out_products
from prifu_plugin.prune.spell_out import spell_out_kinds, spell_out_shapes

Runs = tuple[Inputs, ...]


def recorded(model: nn.Module, runs: Runs) -> tuple[Captured, Runs]:
    """Capture and lower a model, and record on its nodes what two runs give.

    torch.fx comes first: its graph holds for every size. Where it fails, or leaves modules closed
    that could be looked into, the sizes of the first run decide, under guards.

    Args:
        model: with filters, in eval mode.
        runs: inputs to analyse at, and others.

    Returns:
        The graph, and the runs it was recorded with: where guards refuse the second for its size,
        one of another batch size only.

    Raises:
        CaptureError: if neither way leads to a graph, or it takes other inputs.
    """
    plain, failed = _attempt(model, runs, sized=False)
    broken: Exception | None = None
    if plain is not None and not _is_closed_somewhere(plain):
        _check_inputs(plain, runs)
        _guard_unseen(model, plain, runs)
        try:
            return _record(plain, runs), runs
        except Exception as error:  # noqa: BLE001 - traced, but asks for what sizes do not have
            plain, broken = None, error
    sized, later = _attempt(model, runs, sized=True)
    for captured, chosen in _in_turn(model, plain, sized, runs):
        _check_inputs(captured, chosen)
        if captured is sized and chosen[0].batch(1) == chosen[-1].batch(1):  # seen at one size
            fix_sizes(captured.graph, chosen[0].shapes, batch=len(chosen) == 1)
        else:
            _guard_unseen(model, captured, chosen)
        try:
            return _record(captured, chosen), chosen
        except AssertionError as error:  # a guard: decided differently at the other size
            if not is_refusal(error):
                raise
    if sized is not None:
        raise CaptureError(
            f"{type(model).__name__} decides differently for each batch size, as a loop over the "
            "images of a batch does: prune cannot follow. Compute the batch as one tensor."
        )
    raise broken or later or failed or CaptureError(f"{type(model).__name__} cannot be followed.")


def _guard_unseen(model: nn.Module, captured: Captured, runs: Runs) -> None:
    """Refuse sizes that the model takes and no run has changed: conclusions hold at these.

    Of several inputs some may have to change together: whether they can is not tried.
    """
    if len(runs) == 1:
        fix_sizes(captured.graph, runs[0].shapes, batch=True)
        return
    untried = len(runs[0].shapes) > 1 or runs[0].fixed
    unseen = runs[0].unlike(runs[-1])
    places = [at for at, others in unseen if untried or any(takes(model, one) for one in others)]
    fix_dims(captured.graph, runs[0].shapes, places)


def _attempt(
    model: nn.Module, runs: Runs, *, sized: bool
) -> tuple[Captured | None, CaptureError | None]:
    examples = runs[0].draw(model, 0) if sized else None
    try:
        return lower(model, len(runs[0].shapes), examples), None
    except CaptureError as error:
        return None, error


def _in_turn(
    model: nn.Module, plain: Captured | None, sized: Captured | None, runs: Runs
) -> Iterator[tuple[Captured, Runs]]:
    """Yield what to try: looked into at two sizes, at one size, and not looked into."""
    if sized is not None:
        yield sized, runs
        for other in runs[0].batch(3).sized():
            if other != runs[-1] and _lets_pass(sized, other):
                yield sized, (runs[0], other)
        another = runs[0].batch(3)
        if another != runs[-1]:
            yield sized, (runs[0], another) if takes(model, another) else runs[:1]
    if plain is not None:
        yield plain, runs


def _lets_pass(captured: Captured, inputs: Inputs) -> bool:
    """Whether the guards of a graph, and what it computes, take inputs."""
    owner = captured.graph.owning_module
    try:
        return takes(fx.GraphModule(captured.root, captured.graph), inputs)
    finally:
        captured.graph.owning_module = owner  # which GraphModule has made itself


def _record(captured: Captured, runs: Runs) -> Captured:
    examples = [run.draw(captured.root, 0) for run in runs]
    record_examples(captured.root, captured.graph, *examples)
    graph = captured.graph
    if spell_out_shapes(graph) | spell_out_kinds(graph) | spell_out_products(captured):
        record_examples(captured.root, captured.graph, *examples)
    if make_layers(captured) | make_norms(captured):
        drop_unused(captured.graph)
        record_examples(captured.root, captured.graph, *examples)
    return captured


def _is_closed_somewhere(captured: Captured) -> bool:
    """Whether a graph has a call that the other way of capturing would look into."""
    return any(looks_into(captured.root, node) for node in captured.graph.nodes)


def _check_inputs(captured: Captured, runs: Runs) -> None:
    taken = [str(node.target) for node in captured.graph.nodes if node.op == "placeholder"]
    given = len(runs[0].shapes)
    if len(taken) != given:
        raise CaptureError(
            f"The forward of {type(captured.root).__name__} takes {', '.join(taken)} by position, "
            f"and example_inputs are {given} tensors: prune needs one argument for each."
        )
