"""prune: remove the zeroed channels of a wrapped model; rebuild: do it again from a plan."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from prifu_plugin.errors import ConfigError, VerificationError
from prifu_plugin.graph.capture import Captured
from prifu_plugin.graph.insert import apply_recipe, filters
from prifu_plugin.graph.state import input_shapes, wrap_state
from prifu_plugin.prune.examples import record_examples
from prifu_plugin.prune.lower import lower
from prifu_plugin.prune.plan import Plan
from prifu_plugin.prune.planner import make_plan
from prifu_plugin.prune.report import PruneReport, count_bytes, count_macs, count_parameters, fates
from prifu_plugin.prune.rewrite import rewrite
from prifu_plugin.prune.rules import Analysis, analyse
from prifu_plugin.prune.verify import Check, compare, culprit, takes

Shapes = tuple[tuple[int, ...], ...]
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
    compared is not certified. `prifu_plugin.report(pruned)` returns the certificate and the fate of
    every channel, `prifu_plugin.plan(pruned)` the plan from which `rebuild` makes the model again.

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
    shapes = _shapes(model, example_inputs)
    device = next(model.parameters()).device
    filtered = copy.deepcopy(model).cpu().eval()
    if not takes(filtered, shapes):
        raise ConfigError(
            f"{type(model).__name__} refuses inputs of shape {list(shapes)}. Pass "
            "example_inputs= a batch as the model takes it."
        )
    captured = lower(filtered)
    record_examples(filtered, captured.graph, [_ones(filtered, (2, *s[1:])) for s in shapes])
    precise = _precise(filtered)
    analysis = analyse(precise, captured.graph)
    recipe = {**state.recipe(), "input_shapes": [list(shape) for shape in shapes]}
    plan = make_plan(analysis, recipe, round_to)
    pruned = rewrite(captured, plan)
    checks: tuple[Check, ...] = ()
    if verify:
        checks = _certify(analysis, captured, plan, pruned, shapes, seed)
    report = PruneReport(
        checks,
        seed,
        fates(analysis, plan),
        plan.notes,
        (count_parameters(filtered), count_parameters(pruned)),
        (count_macs(filtered, shapes), count_macs(pruned, shapes)),
        (count_bytes(filtered), count_bytes(pruned)),
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
    fresh = copy.deepcopy(model).cpu().eval()
    wrapped = apply_recipe(fresh, plan.recipe)
    captured = lower(wrapped)
    shapes = [(2, *shape[1:]) for shape in plan.recipe["input_shapes"]]
    record_examples(wrapped, captured.graph, [_ones(wrapped, shape) for shape in shapes])
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


def _precise(filtered: nn.Module) -> nn.Module:
    """Copy a model to fp64 with the masks it has: a tie must not be decided again there."""
    precise = copy.deepcopy(filtered).double()
    units = zip(filters(filtered).values(), filters(precise).values(), strict=True)
    for unit, twin in units:
        # An open weight is above 0, so alpha = 0 keeps it open whatever rounding says.
        twin.weight.data.masked_fill_(unit.closed, 0.0)
        twin.alpha = 0.0
    return precise


def _shapes(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...] | None) -> Shapes:
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if example_inputs is not None:
        return tuple(tuple(x.shape) for x in example_inputs)
    shapes = input_shapes(model)
    if shapes is None:
        raise ConfigError(
            f"The input shape of {type(model).__name__} is unknown: pass example_inputs= a "
            "batch, or run the model once before prune."
        )
    return shapes


def _ones(model: nn.Module, shape: Sequence[int]) -> Tensor:
    return torch.ones(tuple(shape)).to(next(model.parameters()))


def _certify(
    analysis: Analysis,
    captured: Captured,
    plan: Plan,
    pruned: fx.GraphModule,
    shapes: Shapes,
    seed: int,
) -> tuple[Check, ...]:
    """Compare in fp64 first, where every mistake shows, then in the model's own precision."""
    precise = analysis.root
    exact = rewrite(Captured(precise, captured.graph), plan)
    single, triple = (_batch(shapes, n) for n in (1, 3))
    other = _resized(shapes)
    second = _batch(other, 3) if other and takes(captured.root, _batch(other, 1)) else triple
    checks = [compare(precise, exact, single, seed), compare(precise, exact, second, seed + 1)]
    checks.append(compare(captured.root, pruned, triple, seed + 2, precise))
    for check in checks:
        if check.holds:
            continue
        for node in captured.graph.nodes:
            if node in analysis.need:
                node.meta["needed"] = analysis.wanted(node)
        where = culprit(Captured(precise, captured.graph), plan, exact, check.shapes)
        raise VerificationError(
            f"The pruned {type(captured.root).__name__} differs from the filtered one by "
            f"{check.difference:.1e} ({check.dtype}, inputs {list(check.shapes)}; allowed "
            f"{check.tolerance:.0e}), first at {where or 'the output'}. Nothing was changed. Leave "
            "the module around it out of the filters with exclude=, and please report it."
        )
    return tuple(checks)


def _batch(shapes: Shapes, size: int) -> Shapes:
    return tuple((size, *shape[1:]) for shape in shapes)


def _resized(shapes: Shapes) -> Shapes | None:
    """Another resolution for images: one side more, the other side less."""
    if len(shapes) != 1 or len(shapes[0]) != 4:
        return None
    n, c, height, width = shapes[0]
    return ((n, c, height + 32, max(width - 32, 32)),)
