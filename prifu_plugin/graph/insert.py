"""wrap and unwrap: put filters behind a model's normalization layers, and take them out."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prifu_plugin.arguments import check_model
from prifu_plugin.config import FilterConfig
from prifu_plugin.cut import CutFilter
from prifu_plugin.errors import ConfigError, NoSiteError, PrifuWarning
from prifu_plugin.filter import WRAPPED, PriFU
from prifu_plugin.graph.checks import check_alone, check_wrappable, warn_of_wrappers
from prifu_plugin.graph.cut_place import probe_cut
from prifu_plugin.graph.functional import FilterGroup, functional_calls, host_calls
from prifu_plugin.graph.host import attach, detach, is_host
from prifu_plugin.graph.norms import norm_spec, num_channels
from prifu_plugin.graph.sites import Site, no_match, norm_modules, select, sites
from prifu_plugin.graph.state import (
    STATE,
    WrapState,
    complete_checkpoint,
    copied,
    fix_scales,
    remember_inputs,
    wrap_state,
)
from prifu_plugin.names import CHILD


def wrap(
    model: nn.Module,
    *,
    alpha: float = 0.1,
    beta: float = 1e-3,
    init: float = 0.1,
    bias: bool = False,
    preserve: bool = True,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    example_inputs: Tensor | tuple[Tensor, ...] | None = None,
    cut: str | None = None,
    cut_dim: int | None = None,
    noise: float = 0.0,
    decay: str = "decoupled",
    inplace: bool = False,
) -> nn.Module:
    """Put a PriFU behind every normalization layer of a model.

    The result is the same model (class, methods, parameter names) with one child more in each
    normalization layer. Train it with any loop; build the optimizer after this call. Returns a
    copy unless `inplace`.

    Args:
        model: any model of timm, torchvision or your own; not inside DDP, torch.compile or EMA.
        alpha: threshold of Eq. 4, in [0, 1).
        beta: decay of Eq. 6; `prifu_plugin.dose_to_beta` computes it for a short run.
        init: initial W.
        bias: add a learnable unfiltered bias per channel (the authors' published code).
        preserve: keep the model's function at the start by a fixed factor 1/init.
        include: glob patterns of module paths to filter; None means all.
        exclude: glob patterns of module paths to leave alone.
        example_inputs: a batch to check the model with, (N, ...); needed for `cut` unless the
            model has a pretrained_cfg.
        cut: path of the module whose output is uploaded; a filter is put on that tensor itself.
        cut_dim: channel dimension of that tensor; None finds it from the layer before.
        noise: standard deviation of the noise on the filtered upload, in units of W (0.3 is the
            recommended setting with a cut).
        decay: "decoupled" for any optimizer, or "coupled" for SGD, whose momentum then carries it:
            the dose is 1 / (1 - momentum) times as large.
        inplace: change `model` instead of a copy.

    Returns:
        The wrapped model.

    Raises:
        ConfigError: for an argument out of range, or example inputs the model refuses.
        NoSiteError: if there is nothing to filter, or a pattern matches nothing.
        OrderError: if the model is wrapped already, or inside DDP, torch.compile or EMA.

    Example:
        >>> net = wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
        >>> type(net[1]).__name__, net[1].prifu
        ('BatchNorm2d', PriFU(4, 4 open, alpha=0.1, beta=0.001))
    """
    config = FilterConfig(
        alpha=alpha,
        beta=beta,
        init=init,
        bias=bias,
        preserve=preserve,
        noise=noise,
        decay=decay,
    )
    if noise > 0 and cut is None:
        raise ConfigError(f"noise={noise} needs a cut: pass cut= the path of the uploaded module.")
    if cut is not None and not isinstance(cut, str):
        raise ConfigError(f"cut={cut!r}: pass the path of the module whose output is uploaded.")
    check_model(model)
    check_wrappable(model)
    if inplace:
        check_alone(model)
    warn_of_wrappers(model)
    state = WrapState(config, tuple(_chosen(model, include, exclude)), cut)
    _check_cut(model, state)
    if cut is not None or example_inputs is not None:
        found = probe_cut(model, example_inputs, cut, cut_dim)
        if found is not None:
            state.cut_dim, state.cut_channels = found
    original = model
    if not inplace:
        model = copied(model)
    _apply(model, state, origin=next((p for p in original.parameters() if p.requires_grad), None))
    return model


def apply_recipe(model: nn.Module, recipe: dict[str, Any]) -> nn.Module:
    """Wrap a fresh model, in place, exactly as another one was wrapped."""
    check_wrappable(model)
    state = WrapState(
        FilterConfig(**recipe["config"]),
        tuple(recipe["paths"]),
        recipe["cut"],
        recipe["cut_dim"],
        recipe["cut_channels"],
    )
    known = {site.path for site in sites(model)} | {path for path, _ in model.named_modules()}
    for path in [*state.paths, *([state.cut] if state.cut else [])]:
        if path not in known:
            raise no_match(path, sorted(known))
    _apply(model, state)
    return model


def unwrap(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Take all filters out: the model as it was before wrap, with the weights it has now.

    Args:
        model: a wrapped model.
        inplace: change `model` instead of a copy.

    Returns:
        The model without filters.

    Raises:
        OrderError: if the model is not wrapped.

    Example:
        >>> [type(m).__name__ for m in unwrap(wrap(nn.Sequential(nn.BatchNorm1d(2)))).modules()]
        ['Sequential', 'BatchNorm1d']
    """
    wrap_state(model)
    if not inplace:
        model = copied(model)
    for host in [module for module in model.modules() if is_host(module)]:
        detach(host)
    hooks = wrap_state(model).hooks
    model._forward_pre_hooks.pop(hooks["inputs"], None)
    model._forward_pre_hooks_with_kwargs.pop(hooks["inputs"], None)
    model._load_state_dict_pre_hooks.pop(hooks["checkpoint"], None)
    model._load_state_dict_post_hooks.pop(hooks["loaded"], None)
    del model.__dict__[STATE]
    return model


def filters(model: nn.Module) -> dict[str, PriFU]:
    """Return the filters of a wrapped model by the path of what they follow.

    Example:
        >>> filters(wrap(nn.Sequential(nn.BatchNorm1d(2))))
        {'0': PriFU(2, 2 open, alpha=0.1, beta=0.001)}
    """
    check_model(model)
    found = {}
    for path, module in model.named_modules():
        if not is_host(module):
            continue
        unit = module._modules[CHILD]
        if isinstance(unit, FilterGroup):
            prefix = f"{path}." if path else ""
            for name, part in unit.items():
                assert isinstance(part, PriFU)
                found[prefix + name] = part
        else:
            found[path] = unit.prifu if isinstance(unit, CutFilter) else unit
    return found


def _chosen(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[str]:
    found = sites(model)
    usable = [site for site in found if not site.refused]
    if not usable:
        raise NoSiteError(
            f"{type(model).__name__} has no normalization layer to put a filter behind"
            + _refusals(found)
            + ". Use an architecture with BatchNorm, LayerNorm or GroupNorm modules; "
            "prifu_plugin.sites(model) lists what was found."
        )
    refused = [site for site in found if site.refused]
    if refused:
        warnings.warn(
            f"{len(refused)} normalization calls get no filter" + _refusals(refused),
            PrifuWarning,
            stacklevel=3,
        )
    chosen = select([site.path for site in usable], include, exclude)
    if not chosen:
        raise NoSiteError("include and exclude leave no normalization layer. Relax the patterns.")
    unused = [site.path for site in usable if site.reached == "never" and site.path in chosen]
    if unused:
        warnings.warn(
            f"The forward of {type(model).__name__}, with its default arguments, never calls "
            f"'{unused[0]}'"
            + (f" and {len(unused) - 1} other normalization layers" if unused[1:] else "")
            + ". Filters there stay untrained, and a forward that reads their parameters instead "
            "bypasses them; leave them out with exclude=.",
            PrifuWarning,
            stacklevel=3,
        )
    return chosen


def _check_cut(model: nn.Module, state: WrapState) -> None:
    """Raise ConfigError if the module at the cut is to hold filters inside its forward, too."""
    owners = {path.rpartition(".")[0] for path in state.paths if not _is_module(model, path)}
    if state.cut in owners:
        raise ConfigError(
            f"cut='{state.cut}' makes functional normalizations in its own forward, which get "
            "filters of their own there. Cut at the module behind it, put it into an "
            "nn.Sequential and cut at that, or leave them out with exclude=."
        )


def _is_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _refusals(found: list[Site]) -> str:
    lines = [f"'{s.path}' ({s.type}): {s.refused}" for s in found if s.refused]
    return "; " + "; ".join(lines[:3]) if lines else ""


def _apply(model: nn.Module, state: WrapState, origin: nn.Parameter | None = None) -> None:
    modules = dict(norm_modules(model))
    first = next(model.parameters(), None)
    _apply_functional(model, state, set(modules), first, origin)
    for path in state.paths:
        if path not in modules:
            continue
        host = modules[path]
        spec = norm_spec(host)
        channels = num_channels(host)
        assert spec is not None
        assert channels is not None
        unit = PriFU(channels, state.config, dim=spec.dim, image_dim=spec.image_dim)
        _place(unit, path, host, first, origin)
        attach(host, unit)
        if _may_be_bypassed(model.get_submodule(path.rpartition(".")[0])):
            unit.register_forward_pre_hook(_do_nothing)
    if state.cut is not None:
        host = model.get_submodule(state.cut)
        cut = CutFilter(state.cut_channels, state.config, dim=state.cut_dim)
        _place(cut.prifu, state.cut, host, first, origin)
        cut.to(device=cut.prifu.weight.device, dtype=cut.prifu.weight.dtype)
        cut.train(host.training)
        attach(host, cut)
    state.hosts = tuple(path for path, module in model.named_modules() if is_host(module))
    state.hooks = {
        "inputs": model.register_forward_pre_hook(remember_inputs, with_kwargs=True).id,
        "checkpoint": model.register_load_state_dict_pre_hook(complete_checkpoint).id,
        "loaded": model.register_load_state_dict_post_hook(fix_scales).id,
    }
    model.__dict__[STATE] = state
    WRAPPED.add(model)


def _may_be_bypassed(owner: nn.Module) -> bool:
    """Whether a module is torch's own, which may have a kernel that reads its norms' parameters.

    nn.TransformerEncoderLayer has, and leaves it unused where a module inside has a hook.
    """
    containers = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
    classes = [cls for cls in type(owner).__mro__ if cls not in containers]
    return any(cls.__module__.startswith("torch.nn.modules.") for cls in classes)


def _do_nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Be a hook that torch can see."""


def _apply_functional(
    model: nn.Module,
    state: WrapState,
    modules: set[str],
    first: nn.Parameter | None,
    origin: nn.Parameter | None,
) -> None:
    """Put filters behind functional normalizations, all of one forward at once."""
    groups: dict[str, list[str]] = {}
    for path in state.paths:
        if path not in modules:
            owner, _, name = path.rpartition(".")
            groups.setdefault(owner, []).append(name)
    for owner, names in groups.items():
        host = model.get_submodule(owner)
        units = {}
        for call in functional_calls(host):
            if call.name in names and call.channels:
                unit = PriFU(call.channels, state.config, dim=call.dim)
                _place(unit, f"{owner}.{call.name}".lstrip("."), host, first, origin)
                units[call.name] = unit
        host_calls(host, FilterGroup(units), CHILD)


def _place(
    unit: PriFU,
    path: str,
    host: nn.Module,
    first: nn.Parameter | None,
    origin: nn.Parameter | None,
) -> None:
    """Tell a filter where it is and what it was made from; move it to its host's device."""
    own = list(host.parameters(recurse=False))
    unit.path = path
    unit.origin = weakref.ref(origin) if origin is not None else None
    beside = next(iter([*own, *host.buffers(recurse=False)]), first)
    if beside is not None:
        dtype = beside.dtype if beside.dtype == torch.float64 else torch.float32
        unit.to(device=beside.device, dtype=dtype)
    unit.train(host.training)
