"""Compare a pruned model with the filtered one, at several sizes and in two precisions."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from functools import partial

import torch
from torch import fx, nn

from prifu_plugin.errors import VerificationError
from prifu_plugin.graph.capture import Captured
from prifu_plugin.graph.guards import is_refusal
from prifu_plugin.prune.hooks import has_hooks
from prifu_plugin.prune.inputs import Inputs
from prifu_plugin.prune.plan import Notes, Plan
from prifu_plugin.prune.precise import in_fp64
from prifu_plugin.prune.rules import Analysis
from prifu_plugin.prune.verify import TOLERANCES, Check, compare, culprit, is_rounded, reference


class DiffersElsewhereError(VerificationError):
    """The pruned model differs at a size of inputs that the analysis has not seen.

    Attributes:
        what: by how much, and where first.
    """

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


def certify(
    analysis: Analysis,
    original: nn.Module,
    captured: Captured,
    exact: Captured,
    plan: Plan,
    both: tuple[fx.GraphModule, fx.GraphModule],
    runs: tuple[Inputs, ...],
    seed: int,
) -> tuple[tuple[Check, ...], Notes]:
    """Compare in fp64 first, where every mistake shows, then in the model's own precision.

    Where rounding alone moves the outputs by more than may be allowed, the weights are compared.

    Args:
        analysis: of the filtered model.
        original: the filtered model, which nothing has been done to.
        captured: its graph.
        exact: the same in fp64.
        plan: from which both pruned models were made.
        both: the pruned model, and its twin in fp64.
        runs: inputs of the analysis.
        seed: of the values that are drawn.

    Returns:
        The comparisons, and what has to be said of them.

    Raises:
        DiffersElsewhereError: if the models agree at the sizes of the analysis, and not at another.
        VerificationError: if they do not agree there.
    """
    pruned, twin = both
    filtered, single, first = _compared_first(exact, twin, runs[0], seed)
    tried = [(first, single), (compare(filtered, twin, runs[-1], seed + 1), runs[-1])]
    more = list(_at_other_sizes(exact, twin, runs, seed + 3))
    own = compare(original, pruned, runs[0], seed + 2, partial(in_fp64, original))
    if own.rounding != own.rounding:  # the graph runs in fp64, which is the model if both agree
        alike = compare(original, captured.root, runs[0], seed + 2).holds
        own = compare(original, pruned, runs[0], seed + 2, (lambda: filtered) if alike else None)
    notes: Notes = ()
    if not own.holds and 4 * own.rounding > own.tolerance:
        if not own.difference <= 4 * own.rounding or not is_rounded(pruned, twin):
            raise VerificationError(_unsure(captured.root, own, first))
        notes = (("the whole", _by_weights(own)),)
    else:
        tried.append((own, runs[0]))
    for check, used in tried + more:
        if check.holds:
            continue
        name, seen = type(captured.root).__name__, (check, used) in tried
        if check.difference != check.difference:
            raise VerificationError(
                f"The filtered {name} itself returns no finite number for "
                f"Gaussian inputs {list(check.shapes)}: nothing can be compared. Look at its "
                "weights and statistics, or pass verify=False if you have another test."
            )
        needed = {node: analysis.wanted(node) for node in analysis.need}
        where = culprit(exact, plan, twin, used, needed)
        what = (
            f"differs from the filtered one by {check.difference:.1e} ({check.dtype}, inputs "
            f"{list(check.shapes)}; allowed {check.tolerance:.0e}), "
            f"first at {where or 'the output'}"
        )
        cure = _of_its_type(exact, twin, used, seed) if seen else ""
        message = f"The pruned {name} {what}. Nothing was changed. {cure or _cure(original)}"
        raise VerificationError(message) if seen else DiffersElsewhereError(message, f"it {what}")
    return tuple(check for check, _ in [*tried[:2], *more, *tried[2:]]), notes


def _by_weights(check: Check) -> str:
    return (
        f"rounding to {check.dtype} alone moves its outputs by {check.rounding:.1e}, and those of "
        f"the pruned model from them by {check.difference:.1e}: compared as a whole in float64, "
        f"and weight by weight in {check.dtype}"
    )


def _unsure(model: nn.Module, check: Check, first: Check) -> str:
    return (
        f"The pruned {type(model).__name__} differs from the filtered one by "
        f"{check.difference:.1e} in {check.dtype}, of which nothing can be concluded: the filtered "
        f"one differs by {check.rounding:.1e} from itself in fp64, where both agree to "
        f"{first.difference:.1e}. Prune it in fp64 (model.double()), train it until it is less "
        "sensitive, or pass verify=False if you have another test."
    )


def _compared_first(
    exact: Captured, twin: fx.GraphModule, inputs: Inputs, seed: int
) -> tuple[nn.Module, Inputs, Check]:
    """Compare in fp64 with one input, or with a batch as it was shown where one is refused.

    Returns:
        The reference in fp64, the inputs that it was given, and the comparison.
    """
    single = inputs.batch(1)
    try:
        filtered, expected = reference(exact, single, seed)
    except Exception:  # noqa: BLE001 - any refusal is an answer
        single = inputs
        filtered, expected = reference(exact, inputs, seed)
    try:
        return filtered, single, compare(filtered, twin, single, seed, expected=expected)
    except AssertionError as error:  # a guard: the graph was made for the batch that was shown
        if not is_refusal(error) or single == inputs:
            raise
    filtered, expected = reference(exact, inputs, seed)
    return filtered, inputs, compare(filtered, twin, inputs, seed, expected=expected)


def _at_other_sizes(
    exact: Captured, twin: fx.GraphModule, runs: tuple[Inputs, ...], seed: int
) -> Iterator[tuple[Check, Inputs]]:
    """Compare in fp64 at sizes that the analysis has not seen, if the model takes several.

    One is about as large, the others are small, where literal numbers in a forward reach further.
    """
    single, seen = runs[0].batch(1), runs[-1].batch(1).shapes
    if single.shapes == seen:
        return
    larger = (one for one in single.elsewhere() if one.shapes != seen)
    for inputs in larger:
        check = _at_another_size(exact, twin, inputs, seed)
        if check is not None:
            yield check, inputs
            break
    for place, inputs in enumerate(single.smaller(), seed + 1):
        for some in (inputs.batch(4), inputs):  # one alone may be 0 where the models differ
            check = _at_another_size(exact, twin, some, place)
            if check is not None:
                yield check, some
                break


def _at_another_size(
    exact: Captured, twin: fx.GraphModule, inputs: Inputs, seed: int
) -> Check | None:
    """Compare in fp64; None if the model refuses the size, or gives no finite number there.

    Nor is anything compared where the graph is not made for it. A pruned model that fails at a
    size which the filtered one takes differs without bound.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a GraphModule prints where it stopped
            filtered, expected = reference(exact, inputs, seed)
    except Exception:  # noqa: BLE001 - any refusal is an answer
        return None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            check = compare(filtered, twin, inputs, seed, expected=expected)
    except Exception as error:  # noqa: BLE001 - whatever it raises, the filtered model does not
        if isinstance(error, AssertionError) and is_refusal(error):
            return None
        return Check("float64", inputs.shapes, float("inf"), TOLERANCES[torch.float64])
    return None if check.difference != check.difference else check


def _of_its_type(exact: Captured, twin: fx.GraphModule, inputs: Inputs, seed: int) -> str:
    """Return what cures a forward that is another function in fp64, "" where it is none.

    Its graph, in which types are decided, agrees with the pruned model there.
    """
    graph = fx.GraphModule(exact.root, exact.graph)
    if not compare(graph, twin, inputs, seed).holds:
        return ""
    return (
        "Its forward gives something else in fp64, where it is compared, than in its own type: it "
        "asks a tensor for its dtype, or for torch.finfo of it. Let it ask for what does not "
        "change with the type, or pass verify=False if you have another test."
    )


def _cure(original: nn.Module) -> str:
    hooked = [path for path, part in original.named_modules() if path and has_hooks(part)]
    if hooked:
        return f"Take the forward hook of '{hooked[0]}' off, if it changes what the layer returns."
    return "Leave the module around it out of the filters with exclude=, and please report it."
