"""prune: remove the zeroed channels of a wrapped model; rebuild: do it again from a plan."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from prifu_plugin.cut import CutFilter
from prifu_plugin.errors import (
    CaptureError,
    ConfigError,
    NoSiteError,
    PrifuError,
    VerificationError,
)
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.capture import Captured
from prifu_plugin.graph.insert import apply_recipe, filters
from prifu_plugin.graph.state import copied, wrap_state
from prifu_plugin.prune.inputs import Inputs, refusal, takes
from prifu_plugin.prune.ladder import recorded
from prifu_plugin.prune.lower import plain_layers
from prifu_plugin.prune.plan import Plan
from prifu_plugin.prune.planner import make_plan
from prifu_plugin.prune.precise import precise, reference
from prifu_plugin.prune.report import PruneReport, count_bytes, count_macs, count_parameters, fates
from prifu_plugin.prune.rewrite import rewrite
from prifu_plugin.prune.rules import Analysis, analyse
from prifu_plugin.prune.verify import Check, compare, culprit

META = "prifu"


def prune(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | None = None,
    *,
    round_to: int = 1,
    verify: bool = True,
    seed: int = 0,
) -> fx.GraphModule:
    """Remove the zeroed channels of a wrapped model; the outputs stay what they are in eval mode.

    The result is a plain torch.fx.GraphModule with the original submodule names: trainable,
    exportable, without filters. It is compared with the filtered model on fresh inputs, in fp64
    and in the model's own precision, at other batch sizes and, for one image input that the model
    takes at another resolution, there too. What a forward does only at sizes that were not
    compared is not certified; where torch.fx cannot follow a forward because it decides on sizes,
    the sizes of the example decide, and the result refuses inputs for which they would not.
    `prifu_plugin.report(pruned)` returns the certificate and the fate of every channel,
    `prifu_plugin.plan(pruned)` the plan from which `rebuild` makes the model again.

    Args:
        model: a wrapped model; it is not changed.
        example_inputs: a batch, (N, ...). Without it the shape of the last forward pass is
            used, or that of timm's pretrained_cfg.
        round_to: widths become multiples of it, with dead channels that stay (8 suits GPUs).
        verify: compare with the filtered model; only switch it off to save time.
        seed: of the inputs it is compared on.

    Returns:
        The pruned model, in eval mode, on the device of `model`.

    Raises:
        OrderError: if the model is not wrapped.
        ConfigError: if the input shape is unknown, or the model refuses it.
        CaptureError: if the model cannot be traced.
        FilterError: if a weight is not finite.
        VerificationError: if the pruned model differs; the message names the first node.

    Example:
        >>> import prifu_plugin as prifu
        >>> layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        >>> net = prifu.wrap(nn.Sequential(*layers))
        >>> _ = prifu.filters(net)["1"].weight.data[:2].zero_()
        >>> prune(net, torch.zeros(1, 3, 8, 8)).get_submodule("0").out_channels
        2
    """
    state = wrap_state(model)
    if round_to < 1:
        raise ConfigError(f"round_to={round_to} is not a positive number of channels.")
    for unit in filters(model).values():
        unit.check_finite()
    inputs = Inputs.for_model(model, example_inputs)
    device = next(model.parameters()).device
    with torch.inference_mode(False):
        filtered = plain_layers(copied(model).cpu().eval())
        size = count_parameters(filtered), count_bytes(filtered)
        runs = _runs(filtered, inputs)
        with _explained(filtered):
            captured, runs = recorded(filtered, runs)
            exact = precise(captured)
            analysis = analyse(exact.root, exact.graph)
            graph = _fingerprint(captured)
            recipe = {**state.recipe(), "inputs": runs[0].to_dict(), "graph": graph}
            plan = make_plan(analysis, recipe, round_to)
            pruned = rewrite(captured, plan)
        checks: tuple[Check, ...] = ()
        if verify:
            checks = _certify(analysis, captured, exact, plan, pruned, runs, seed)
        report = PruneReport(
            checks,
            seed,
            fates(analysis, plan),
            plan.notes,
            (size[0], count_parameters(pruned)),
            (count_macs(filtered, runs[0]), count_macs(pruned, runs[0])),
            (size[1], count_bytes(pruned)),
        )
    # Plain data only: the result must not need prifu_plugin to be loaded.
    pruned.meta[META] = {"plan": plan.to_json(), "report": report.to_dict()}
    return pruned.to(device)


def rebuild(model: nn.Module, plan: Plan | str, state_dict: dict[str, Tensor]) -> fx.GraphModule:
    """Make a pruned model again from a fresh original, the plan and the pruned weights.

    Args:
        model: the architecture that was wrapped, with any weights; it is not changed.
        plan: from `prifu_plugin.plan`, or its JSON text.
        state_dict: of the pruned model.

    Returns:
        The pruned model.

    Raises:
        NoSiteError: if the model is another architecture.
        RuntimeError: from load_state_dict, if the weights are another model's.

    Example:
        >>> import prifu_plugin as prifu
        >>> make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> small = prune(prifu.wrap(make()), torch.zeros(1, 3, 8, 8))
        >>> again = rebuild(make(), plan_of(small), small.state_dict())
        >>> torch.equal(again(torch.ones(1, 3, 8, 8)), small(torch.ones(1, 3, 8, 8)))
        True
    """
    if isinstance(plan, str):
        plan = Plan.from_json(plan)
    fresh = copied(model).cpu().eval()
    reference = next((v for v in state_dict.values() if v.is_floating_point()), torch.zeros(()))
    wrapped = plain_layers(apply_recipe(fresh, plan.recipe).to(reference.dtype))
    inputs = Inputs.from_dict(plan.recipe["inputs"])
    captured, _ = recorded(wrapped, _runs(wrapped, inputs))
    if _fingerprint(captured) != plan.recipe["graph"]:
        raise NoSiteError(
            f"This {type(model).__name__} computes another graph than the one the plan was made "
            "for. Build the model that was wrapped, with the same arguments and versions."
        )
    pruned = rewrite(captured, plan)
    pruned.load_state_dict(state_dict)
    pruned.meta[META] = {"plan": plan.to_json()}
    return pruned


def report(pruned: nn.Module) -> PruneReport:
    """Return the certificate and report that prune attached to its result.

    Raises:
        ConfigError: if the model was not made by prune.
    """
    data = _attached(pruned).get("report")
    if data is None:
        raise ConfigError("A rebuilt model has no report; ask the model that prune returned.")
    return PruneReport.from_dict(data)


def plan_of(pruned: nn.Module) -> Plan:
    """Return the plan that prune attached to its result.

    Raises:
        ConfigError: if the model was not made by prune.
    """
    return Plan.from_json(_attached(pruned)["plan"])


def _attached(pruned: nn.Module) -> dict[str, Any]:
    data = getattr(pruned, "meta", {}).get(META) if isinstance(pruned, fx.GraphModule) else None
    if data is None:
        raise ConfigError(f"{type(pruned).__name__} was not made by prifu_plugin.prune.")
    return data  # type: ignore[no-any-return]


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
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


def _runs(filtered: nn.Module, inputs: Inputs) -> tuple[Inputs, ...]:
    """Return the inputs to analyse at, and others of another batch size and size if it takes them.

    What the two runs do not share is not concluded.
    """
    first = inputs.batch(2) if takes(filtered, inputs.batch(2)) else inputs
    why = refusal(filtered, first)
    if why is not None:
        raise ConfigError(
            f"{type(filtered).__name__} refuses inputs of shape {list(inputs.shapes)}: {why} "
            "Pass example_inputs= a batch as the model takes it."
        )
    others = [*inputs.batch(3).sized(), inputs.batch(3)]
    other = next((one for one in others if takes(filtered, one)), None)
    return (first,) if other is None else (first, other)


def _fingerprint(captured: Captured) -> str:
    """Return a digest of what a graph computes, weights left out."""
    lines = []
    for node in captured.graph.nodes:
        target = getattr(node.target, "__name__", node.target)
        what = ""
        if node.op == "call_module":
            module = captured.root.get_submodule(str(node.target))
            shown = not isinstance(module, PriFU | CutFilter)
            what = f"{type(module).__name__}({module.extra_repr() if shown else ''})"
        lines.append(f"{node.name} {node.op} {target} {what} {node.args} {node.kwargs}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _certify(
    analysis: Analysis,
    captured: Captured,
    exact: Captured,
    plan: Plan,
    pruned: fx.GraphModule,
    runs: tuple[Inputs, ...],
    seed: int,
) -> tuple[Check, ...]:
    """Compare in fp64 first, where every mistake shows, then in the model's own precision."""
    single = runs[0].batch(1) if takes(captured.root, runs[0].batch(1)) else runs[0]
    own = runs[0].batch(3) if takes(captured.root, runs[0].batch(3)) else runs[0]
    filtered = reference(exact, single.draw(exact.root, seed))
    twin = rewrite(exact, plan)
    checks = [
        compare(filtered, twin, single, seed),
        compare(filtered, twin, runs[-1], seed + 1),
        compare(captured.root, pruned, own, seed + 2, filtered),
    ]
    for check, used in zip(checks, (single, runs[-1], own), strict=True):
        if check.holds:
            continue
        for node in exact.graph.nodes:
            if node in analysis.need:
                node.meta["needed"] = analysis.wanted(node)
        if check.difference != check.difference:
            raise VerificationError(
                f"The filtered {type(captured.root).__name__} itself returns no finite number for "
                f"Gaussian inputs {list(check.shapes)}: nothing can be compared. Look at its "
                "weights and statistics, or pass verify=False if you have another test."
            )
        where = culprit(exact, plan, twin, used)
        raise VerificationError(
            f"The pruned {type(captured.root).__name__} differs from the filtered one by "
            f"{check.difference:.1e} ({check.dtype}, inputs {list(check.shapes)}; allowed "
            f"{check.tolerance:.0e}), first at {where or 'the output'}. Nothing was changed. Leave "
            "the module around it out of the filters with exclude=, and please report it."
        )
    return tuple(checks)
