"""Prune one graph: facts, plan, rewriting and certificate of a model that can be captured."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from tqdm import tqdm

from prifu_plugin.cut import CutFilter
from prifu_plugin.errors import CaptureError, ConfigError, PrifuError, VerificationError
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.capture import Captured
from prifu_plugin.graph.guards import is_refusal
from prifu_plugin.prune.asleep import asleep
from prifu_plugin.prune.hooks import has_hooks
from prifu_plugin.prune.inputs import Inputs, refusal, suited, takes
from prifu_plugin.prune.ladder import recorded
from prifu_plugin.prune.loadable import why_not_loadable
from prifu_plugin.prune.plan import Plan
from prifu_plugin.prune.planner import make_plan
from prifu_plugin.prune.precise import precise
from prifu_plugin.prune.report import Fate, fates
from prifu_plugin.prune.rewrite import rewrite
from prifu_plugin.prune.rules import Analysis, analyse
from prifu_plugin.prune.settings import PruneSettings
from prifu_plugin.prune.statefulness import check_stateless
from prifu_plugin.prune.verify import Check, compare, culprit, reference
from prifu_plugin.prune.zeroed import zeroed


@dataclass(frozen=True)
class Pruned:
    """What came of pruning.

    Attributes:
        model: in the precision of what it was made from.
        exact: the same in fp64, by which it was verified; `model` itself if it was not.
        plan: from which it was made; None of what was pruned in parts.
        checks: the certificate, empty if it was not asked for.
        layers: the fate of every channel.
        notes: (node or path, what was left there and why).
        way: how the forward was followed, as `PruneReport` says it.
    """

    model: nn.Module
    exact: nn.Module
    plan: Plan | None
    checks: tuple[Check, ...]
    layers: tuple[Fate, ...]
    notes: tuple[tuple[str, str], ...]
    way: str


def prune_graph(
    filtered: nn.Module,
    runs: tuple[Inputs, ...],
    recipe: dict[str, Any],
    settings: PruneSettings,
    original: nn.Module | None = None,
) -> Pruned:
    """Prune a model with filters that can be captured as one graph.

    Args:
        filtered: on the CPU, in eval mode; layers may be added to it, nothing else changes.
        runs: inputs to analyse at, and others (`runs_of`).
        recipe: how the model was wrapped, for the plan.
        settings: what was asked for.
        original: what `filtered` is a copy of, which nothing has been done to; the result is
            compared with it too.

    Raises:
        CaptureError: if it cannot be traced or analysed.
        VerificationError: if the pruned model differs.
    """
    passes = ("capture", "facts", "plan", "rewrite", *(["verify"] if settings.verify else []))
    checks: tuple[Check, ...] = ()
    with explained(filtered), _shown(passes) as begin:
        begin("capture")
        stored = check_stateless(filtered, runs[0])
        captured, runs = recorded(filtered, runs)
        exact = precise(captured)
        begin("facts")
        analysis = analyse(exact.root, exact.graph)
        begin("plan")
        made_of = {"inputs": runs[0].to_dict(), "graph": fingerprint(captured)}
        plan = make_plan(analysis, {**recipe, **made_of}, settings.round_to, settings.move_cost)
        plan = dataclasses.replace(plan, notes=(*plan.notes, *asleep(captured.graph)))
        layers, at_zero = fates(analysis, plan), zeroed(analysis)
        analysis.release()
        begin("rewrite")
        pruned = rewrite(captured, plan)
        twin = rewrite(exact, plan) if settings.verify else pruned
        if settings.verify:
            begin("verify")
            original = captured.root if original is None else original
            both = (pruned, twin)
            checks = _certify(analysis, original, captured, exact, plan, both, runs, settings.seed)
    notes = (*plan.notes, *stored, *captured.notes, *at_zero, *_unloadable(pruned))
    return Pruned(pruned, twin, plan, checks, layers, notes, captured.way)


def _unloadable(pruned: fx.GraphModule) -> list[tuple[str, str]]:
    why = why_not_loadable(pruned)
    if why is None:
        return []
    cure = "keep its plan and state dict for rebuild, or export it"
    name = type(pruned).__name__
    return [(name, f"torch.load cannot read what torch.save writes of it whole ({why}): {cure}")]


@contextlib.contextmanager
def explained(model: nn.Module) -> Iterator[None]:
    """Turn an error of the analysis into one that says what was refused."""
    try:
        yield
    except PrifuError:
        raise
    except Exception as error:
        raise CaptureError(
            f"prune cannot analyse this {type(model).__name__} ({type(error).__name__}: {error}), "
            "and leaves it as it is. Please report the model."
        ) from error


@contextlib.contextmanager
def _shown(passes: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """Show on a terminal which pass is running; yields what a pass calls when it begins."""
    with tqdm(total=len(passes), leave=False, disable=None, bar_format="{desc} {bar:12}") as bar:

        def begin(name: str) -> None:
            bar.n = passes.index(name)
            bar.set_description_str(f"prune: {name}")

        yield begin


def runs_of(filtered: nn.Module, inputs: Inputs) -> tuple[Inputs, ...]:
    """Return the inputs to analyse at, and others of another batch size and size if it takes them.

    What the two runs do not share is not concluded.
    """
    first = suited(filtered, inputs.batch(2), inputs)
    if first is None:
        why = refusal(filtered, inputs)
        raise ConfigError(
            f"{type(filtered).__name__} refuses inputs of shape {list(inputs.shapes)}: {why}. "
            "Pass example_inputs= a batch as the model takes it, with values of the kind it takes."
        )
    inputs = dataclasses.replace(inputs, within=first.within)
    more = inputs.batch(inputs.shapes[0][0] + 1)  # indices may point at as many as were shown
    others = [*inputs.batch(3).sized(), inputs.batch(3), *more.sized(), more, *first.sized()]
    other = next((one for one in others if takes(filtered, one)), None)
    return (first,) if other is None else (first, other)


def fingerprint(captured: Captured) -> str:
    """Return a digest of what a graph computes, weights left out."""
    lines = []
    for node in captured.graph.nodes:
        target = getattr(node.target, "__name__", node.target)
        what = ""
        if node.op == "call_module":
            module = captured.root.get_submodule(str(node.target))
            shown = not isinstance(module, PriFU | CutFilter)
            said = f"{module.extra_repr()} {_configuration(module)}" if shown else ""
            what = f"{type(module).__name__}({said})"
        lines.append(f"{node.name} {node.op} {target} {what} {node.args} {node.kwargs}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _configuration(module: nn.Module) -> dict[str, Any]:
    """Return the plain arguments of a module's constructor that it keeps under their names."""
    names = {name for cls in type(module).__mro__ for name in _arguments_of(cls)}
    known = {name: getattr(module, name, None) for name in sorted(names)}
    plain = (bool, int, float, str)
    return {name: value for name, value in known.items() if isinstance(value, plain)}


def _arguments_of(cls: type) -> tuple[str, ...]:
    code = getattr(cls.__dict__.get("__init__"), "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _certify(
    analysis: Analysis,
    original: nn.Module,
    captured: Captured,
    exact: Captured,
    plan: Plan,
    both: tuple[fx.GraphModule, fx.GraphModule],
    runs: tuple[Inputs, ...],
    seed: int,
) -> tuple[Check, ...]:
    """Compare in fp64 first, where every mistake shows, then in the model's own precision."""
    pruned, twin = both
    filtered, single, first = _compared_first(exact, twin, runs[0], seed)
    checks = [
        first,
        compare(filtered, twin, runs[-1], seed + 1),
        compare(original, pruned, runs[0], seed + 2, filtered),
    ]
    used_for = [single, runs[-1], runs[0]]
    third = _at_third_size(exact, twin, runs, seed + 3)
    if third is not None:
        checks.insert(2, third[0])
        used_for.insert(2, third[1])
    for check, used in zip(checks, used_for, strict=True):
        if check.holds:
            continue
        if check.difference != check.difference:
            raise VerificationError(
                f"The filtered {type(captured.root).__name__} itself returns no finite number for "
                f"Gaussian inputs {list(check.shapes)}: nothing can be compared. Look at its "
                "weights and statistics, or pass verify=False if you have another test."
            )
        if 4 * check.rounding > check.tolerance:
            raise VerificationError(_unsure(captured.root, check, first))
        needed = {node: analysis.wanted(node) for node in analysis.need}
        where = culprit(exact, plan, twin, used, needed)
        raise VerificationError(
            f"The pruned {type(captured.root).__name__} differs from the filtered one by "
            f"{check.difference:.1e} ({check.dtype}, inputs {list(check.shapes)}; allowed "
            f"{check.tolerance:.0e}), first at {where or 'the output'}. Nothing was changed. "
            + _cure(original)
        )
    return tuple(checks)


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


def _at_third_size(
    exact: Captured, twin: fx.GraphModule, runs: tuple[Inputs, ...], seed: int
) -> tuple[Check, Inputs] | None:
    """Compare in fp64 at a size that the analysis has not seen, if the model takes several."""
    other = runs[-1].batch(1).shapes
    if runs[0].batch(1).shapes == other:
        return None
    for inputs in runs[0].batch(1).elsewhere():
        if inputs.shapes == other:
            continue
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a GraphModule prints where it stopped
                filtered, expected = reference(exact, inputs, seed)
        except Exception:  # noqa: BLE001, PERF203 - any refusal is an answer
            continue
        try:
            return compare(filtered, twin, inputs, seed, expected=expected), inputs
        except AssertionError as error:  # a guard
            if not is_refusal(error):
                raise
    return None


def _cure(original: nn.Module) -> str:
    hooked = [path for path, part in original.named_modules() if path and has_hooks(part)]
    if hooked:
        return f"Take the forward hook of '{hooked[0]}' off, if it changes what the layer returns."
    return "Leave the module around it out of the filters with exclude=, and please report it."
