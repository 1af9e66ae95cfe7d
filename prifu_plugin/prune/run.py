"""prune: remove the zeroed channels of a wrapped model; rebuild: do it again from a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from prifu_plugin.arguments import check_model, number, whole_number
from prifu_plugin.device import device_of
from prifu_plugin.errors import CaptureError, ConfigError, NoSiteError, VerificationError
from prifu_plugin.formats import reading
from prifu_plugin.graph.insert import apply_recipe, filters
from prifu_plugin.graph.sites import norm_modules
from prifu_plugin.graph.state import META, copied, wrap_state
from prifu_plugin.graph.values import check_present
from prifu_plugin.graph.watch import check_filters_are_there
from prifu_plugin.prune.attributes import keep_attributes, keep_memory_format
from prifu_plugin.prune.hooks import has_hooks, take_off
from prifu_plugin.prune.inputs import Inputs
from prifu_plugin.prune.ladder import recorded
from prifu_plugin.prune.one_graph import Pruned, explained, fingerprint, prune_graph, runs_of
from prifu_plugin.prune.parts import prune_parts
from prifu_plugin.prune.plain import plain_layers
from prifu_plugin.prune.plan import Plan
from prifu_plugin.prune.report import PruneReport, count_bytes, count_macs, count_parameters
from prifu_plugin.prune.rewrite import rewrite
from prifu_plugin.prune.settings import PruneSettings
from prifu_plugin.prune.sharing import separated
from prifu_plugin.prune.verify import Check, compare
from prifu_plugin.sharded import check_unsharded


def prune(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | None = None,
    *,
    round_to: int = 1,
    move_cost: float = 0.0,
    verify: bool = True,
    seed: int = 0,
) -> Any:
    """Remove the zeroed channels of a wrapped model; the outputs stay what they are in eval mode.

    The result is a plain torch.fx.GraphModule with the original submodule names: trainable,
    exportable, without filters, with the plain attributes of the original (num_classes,
    pretrained_cfg; those that name widths inside name the original's). What a forward does in
    training only, functional dropout among it, is not in it; the report names that dropout. Where
    the forward cannot be followed at all (detectors; regions under autocast or without gradients),
    it is a copy of the model whose largest parts that can be are such modules; the report names
    them, and such a result has no plan. It is compared with the filtered model on fresh inputs, in
    fp64 and in the model's own precision, at other batch sizes and, where the model takes other
    resolutions or lengths, at two of them. Inputs are drawn, numbers Gaussian or in the
    range that was shown, integers in it: what must make sense together (boxes of regions) will
    not. What a forward does only at sizes that were not compared is not certified; where torch.fx
    cannot follow a forward because it decides on sizes, the sizes of the example decide, and the
    result refuses inputs for which they would not.
    `prifu_plugin.report(pruned)` returns the certificate and the fate of every channel,
    `prifu_plugin.plan(pruned)` the plan from which `rebuild` makes the model again.

    Args:
        model: a wrapped model; it is not changed.
        example_inputs: a batch, (N, ...). Without it the shape of the last forward pass is
            used, or that of timm's pretrained_cfg.
        round_to: widths become multiples of it, with dead channels that stay (8 suits GPUs; more
            than there are keeps all); not those of layers that are called several times.
        move_cost: multiply-accumulates that moving one value is taken to cost. Where dropping
            channels needs a copy that costs more than it saves, they stay; 0 removes all that
            can go, inf what goes without a copy. `fastest` measures which is best.
        verify: compare with the filtered model; only switch it off to save time.
        seed: of the inputs it is compared on.

    Returns:
        The pruned model, in eval mode, on the device of `model`.

    Raises:
        OrderError: if the model is not wrapped, its weights have no values yet or are sharded, or
            a layer with a filter was replaced.
        ConfigError: if the input shape is unknown, or the model refuses it.
        CaptureError: if neither the model nor any part of it can be traced.
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
    check_filters_are_there(model, wrap_state(model).hosts)
    round_to, seed = whole_number("round_to", round_to), whole_number("seed", seed, least=0)
    move_cost = number("move_cost", move_cost)
    if not move_cost >= 0:
        raise ConfigError(f"move_cost={move_cost} is not 0 or more multiply-accumulates.")
    check_present(model)
    check_unsharded(model, "prune")
    for unit in filters(model).values():
        unit.check_finite()
    inputs = Inputs.for_model(model, example_inputs)
    settings = PruneSettings(round_to, move_cost, verify, seed)
    # Layers that are made on the way draw initial values.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        filtered = plain_layers(copied(model).cpu().eval())
        lost = take_off(filtered)
        size = count_parameters(filtered), count_bytes(filtered)
        runs = runs_of(filtered, inputs)
        macs = count_macs(filtered, runs[0])
        found = _pruned(model, filtered, runs, settings)
        report = PruneReport(
            found.checks,
            seed,
            found.layers,
            (
                *lost,
                *_without_scale(filtered),
                *separated(filtered, found.model),
                *found.notes,
            ),
            (size[0], count_parameters(found.model)),
            (macs, count_macs(found.model, runs[0])),
            (size[1], count_bytes(found.model)),
            found.way,
        )
    # Plain data only: the result must not need prifu_plugin to be loaded.
    plan = found.plan.to_json() if found.plan else None
    _attach(found.model, {"plan": plan, "report": report.to_dict()})
    keep_memory_format(model, found.model)
    return found.model.to(next(model.parameters()).device)


def _pruned(
    model: nn.Module, filtered: nn.Module, runs: tuple[Inputs, ...], settings: PruneSettings
) -> Pruned:
    """Prune a model as one graph; in parts where its forward cannot be followed."""
    original = copied(model).cpu().eval() if settings.verify else None
    if original is not None and has_hooks(original):
        check = compare(original, filtered, runs[0], settings.seed)  # which has lost them
        if not check.holds:
            raise VerificationError(
                f"A forward hook of this {type(model).__name__} itself changes what it takes or "
                f"returns, by {check.difference:.1e}; a pruned model does not have it. Take the "
                "hook of the model itself off first, or put what it does into a module inside."
            )
        take_off(original)
    recipe = wrap_state(model).recipe()
    try:
        whole = prune_graph(filtered, runs, recipe, settings, original)
    except CaptureError as error:
        with explained(filtered):
            if original is not None:  # parts are compared with those of the copy
                _check_copy(compare(original, filtered, runs[0], settings.seed), model)
            return prune_parts(filtered, runs[0], error, settings)
    keep_attributes(model, whole.model)
    return whole


def _check_copy(check: Check, model: nn.Module) -> None:
    if not check.holds:
        raise VerificationError(
            f"With the values of its computed weights this {type(model).__name__} differs from "
            f"itself by {check.difference:.1e}. Remove its parametrizations first "
            "(torch.nn.utils.parametrize.remove_parametrizations), and please report it."
        )


def rebuild(model: nn.Module, plan: Plan | str, state_dict: dict[str, Tensor]) -> fx.GraphModule:
    """Make a pruned model again from a fresh original, the plan and the pruned weights.

    Args:
        model: the architecture that was wrapped, with any weights; it is not changed.
        plan: from `prifu_plugin.plan`, or its JSON text.
        state_dict: of the pruned model.

    Returns:
        The pruned model, on the device of `model`.

    Raises:
        NoSiteError: if the model is another architecture.
        OrderError: if the model's weights have no values yet.
        ConfigError: if plan is none, or the weights are another model's.

    Example:
        >>> import prifu_plugin as prifu
        >>> make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> small = prune(prifu.wrap(make()), torch.zeros(1, 3, 8, 8))
        >>> again = rebuild(make(), plan_of(small), small.state_dict())
        >>> torch.equal(again(torch.ones(1, 3, 8, 8)), small(torch.ones(1, 3, 8, 8)))
        True
    """
    check_model(model)
    if isinstance(plan, str):
        plan = Plan.from_json(plan)
    _check_kept(plan, state_dict)
    check_present(model)
    with torch.inference_mode(False):
        return _rebuilt(model, plan, state_dict)


def _rebuilt(model: nn.Module, plan: Plan, state_dict: dict[str, Tensor]) -> fx.GraphModule:
    fresh = copied(model).cpu().eval()
    with reading("plan"):
        wrapped = plain_layers(apply_recipe(_in_type_of(fresh, state_dict), plan.recipe))
        inputs, graph = Inputs.from_dict(plan.recipe["inputs"]), plan.recipe["graph"]
    captured, _ = recorded(wrapped, runs_of(wrapped, inputs))
    if fingerprint(captured) != graph:
        raise NoSiteError(
            f"This {type(model).__name__} computes another graph than the one the plan was made "
            "for. Build the model that was wrapped, with the same arguments and versions."
        )
    with reading("plan"):
        pruned = rewrite(captured, plan)
    _cast(pruned, state_dict)
    try:
        pruned.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ConfigError(
            f"state_dict is not of the model this plan made: {error} Pass the state_dict of the "
            "pruned model whose plan this is."
        ) from None
    keep_attributes(model, pruned)
    keep_memory_format(model, pruned)
    _attach(pruned, {"plan": plan.to_json()})
    return pruned.to(device_of(model))


def _in_type_of(fresh: nn.Module, state_dict: dict[str, Tensor]) -> nn.Module:
    """Bring a model to the type of the weights, or each part to its own if there are several."""
    both = [(p, state_dict[n]) for n, p in fresh.named_parameters() if n in state_dict]
    types = {(p.dtype, value.dtype) for p, value in both if value.is_floating_point()}
    if len(types) != 1:
        _cast(fresh, state_dict)
        return fresh
    own, asked = types.pop()
    return fresh if own == asked else fresh.to(asked)


def _cast(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Give parameters and buffers, in place, the types of those that have their names."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        asked = state_dict.get(name)
        if asked is not None and value.is_floating_point() and asked.is_floating_point():
            value.data = value.data.to(asked.dtype)


def _check_kept(plan: Any, state_dict: Any) -> None:
    if not isinstance(plan, Plan):
        raise ConfigError(
            f"plan is a {type(plan).__name__}: pass what prifu_plugin.plan(pruned) returned, or "
            "the text of its to_json()."
        )
    if not isinstance(state_dict, Mapping):
        raise ConfigError(
            f"state_dict is a {type(state_dict).__name__}: pass pruned.state_dict(), as a file of "
            "safetensors or torch.load(weights_only=True) gives it."
        )
    odd = next((key for key, value in state_dict.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ConfigError(
            f"state_dict holds a {type(state_dict[odd]).__name__} at '{odd}': pass the tensors of "
            "pruned.state_dict() themselves."
        )


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
        ConfigError: if the model was not made by prune, or part by part.
    """
    plan = _attached(pruned)["plan"]
    if plan is None:
        raise ConfigError(
            f"{type(pruned).__name__} was pruned in parts, since its forward cannot be followed: "
            "there is no plan. Keep the module itself, or export it."
        )
    return Plan.from_json(plan)


def _without_scale(model: nn.Module) -> list[tuple[str, str]]:
    """Note norms whose own scale is 0 everywhere, as timm starts the last of residual branches."""
    scales = {path: getattr(norm, "weight", None) for path, norm in norm_modules(model)}
    why = "its own scale is 0: what leads to it alone is gone, and cannot be trained again"
    return [(path, why) for path, scale in scales.items() if scale is not None and not scale.any()]


def _attached(pruned: nn.Module) -> dict[str, Any]:
    check_model(pruned, "pruned")
    data = pruned.__dict__.get(META)
    if data is None and isinstance(pruned, fx.GraphModule):
        data = pruned.meta.get(META)
    if data is None:
        raise ConfigError(f"{type(pruned).__name__} was not made by prifu_plugin.prune.")
    return data  # type: ignore[no-any-return]


def _attach(pruned: nn.Module, data: dict[str, Any]) -> None:
    """Keep plain data on a model: copies of a graph keep its meta, pickles its attributes."""
    pruned.__dict__[META] = data
    if isinstance(pruned, fx.GraphModule):
        pruned.meta[META] = data
