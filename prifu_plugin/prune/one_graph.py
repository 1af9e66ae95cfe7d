"""Prune one graph: facts, plan, rewriting and certificate of a model that can be captured."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from tqdm import tqdm

from prifu_plugin.cut import CutFilter
from prifu_plugin.errors import CaptureError, ConfigError, PrifuError, first_line
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.capture import Captured
from prifu_plugin.prune.asleep import asleep
from prifu_plugin.prune.certificate import DiffersElsewhereError, certify
from prifu_plugin.prune.inputs import Inputs, refused, suited, takes
from prifu_plugin.prune.ladder import recorded
from prifu_plugin.prune.loadable import why_not_loadable
from prifu_plugin.prune.plan import Notes, Plan
from prifu_plugin.prune.planner import make_plan
from prifu_plugin.prune.precise import precise
from prifu_plugin.prune.report import Fate, fates
from prifu_plugin.prune.rewrite import rewrite
from prifu_plugin.prune.rules import analyse
from prifu_plugin.prune.settings import PruneSettings
from prifu_plugin.prune.statefulness import check_stateless
from prifu_plugin.prune.verify import Check
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
    notes: Notes
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

    What differs at a size that the analysis has not seen is pruned for the given size alone.

    Raises:
        CaptureError: if it cannot be traced or analysed.
        VerificationError: if the pruned model differs.
    """
    try:
        return _prune_graph(filtered, runs, recipe, settings, original)
    except DiffersElsewhereError as error:
        at_one = runs_of(filtered, dataclasses.replace(runs[0], fixed=True))
        found = _prune_graph(filtered, at_one, recipe, settings, original)
        why = f"it is made for inputs of this size: at another, {error.what}"
        return dataclasses.replace(found, notes=(("the whole", why), *found.notes))


def _prune_graph(
    filtered: nn.Module,
    runs: tuple[Inputs, ...],
    recipe: dict[str, Any],
    settings: PruneSettings,
    original: nn.Module | None,
) -> Pruned:
    passes = ("capture", "facts", "plan", "rewrite", *(["verify"] if settings.verify else []))
    checks: tuple[Check, ...] = ()
    unsure: Notes = ()
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
            checks, unsure = certify(
                analysis, original, captured, exact, plan, both, runs, settings.seed
            )
    notes = (*unsure, *plan.notes, *stored, *captured.notes, *at_zero, *_unloadable(pruned))
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
        error = refused(filtered, inputs)
        if isinstance(error, PrifuError):  # a filter's own, which says more
            raise error
        why = "" if error is None else first_line(error).rstrip(".")
        raise ConfigError(
            f"{type(filtered).__name__} refuses inputs of shape {list(inputs.shapes)}: {why}. "
            "Pass example_inputs= a batch as the model takes it, with values of the kind it takes."
        )
    inputs = dataclasses.replace(inputs, within=first.within)
    more = inputs.batch(inputs.shapes[0][0] + 1)  # indices may point at as many as were shown
    base = _changed_together(filtered, inputs.batch(3))
    others = [*base.sized(), base, *inputs.batch(3).sized(), inputs.batch(3)]
    others += [*more.sized(), more, *first.sized()]
    other = next((one for one in others if takes(filtered, one)), None)
    return (first,) if other is None else (first, other)


def _changed_together(filtered: nn.Module, inputs: Inputs) -> Inputs:
    """Return inputs with other sizes where several share one, as far as the model takes them."""
    for places, sizes in inputs.shared():
        changed = (inputs.with_size(places, size) for size in sizes)
        inputs = next((one for one in changed if takes(filtered, one)), inputs)
    return inputs


def fingerprint(captured: Captured) -> str:
    """Return a digest of what a graph computes, weights left out."""
    lines = []
    for node in captured.graph.nodes:
        target = getattr(node.target, "__name__", node.target)
        what = ""
        if node.op == "call_module":
            module = captured.root.get_submodule(str(node.target))
            what = " ".join(_described(path, part) for path, part in module.named_modules())
        lines.append(f"{node.name} {node.op} {target} {what} {node.args} {node.kwargs}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _described(path: str, module: nn.Module) -> str:
    """Say what a module computes, weights left out; of filters, which masks change, that it is one.

    What a graph keeps whole may hold others: a normalization its activation.
    """
    shown = not isinstance(module, PriFU | CutFilter)
    said = f"{module.extra_repr()} {_configuration(module)}" if shown else ""
    return f"{path}{type(module).__name__}({said})"


def _configuration(module: nn.Module) -> dict[str, Any]:
    """Return the plain arguments of a module's constructor that it keeps under their names."""
    names = {name for cls in type(module).__mro__ for name in _arguments_of(cls)}
    known = {name: getattr(module, name, None) for name in sorted(names)}
    plain = (bool, int, float, str)
    return {name: value for name, value in known.items() if isinstance(value, plain)}


def _arguments_of(cls: type) -> tuple[str, ...]:
    code = getattr(cls.__dict__.get("__init__"), "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
