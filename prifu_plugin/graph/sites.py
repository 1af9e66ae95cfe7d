"""List the normalization calls of a model: where each is, and whether it is filtered."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prifu_plugin.arguments import check_model, strings
from prifu_plugin.errors import CaptureError, NoSiteError
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.capture import Captured, calls, capture
from prifu_plugin.graph.functional import (
    FilterGroup,
    functional_calls,
    functional_owners,
    names_functional,
)
from prifu_plugin.graph.host import is_host
from prifu_plugin.graph.norms import base_class, dim_of_name, norm_spec, num_channels
from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.names import CHILD


@dataclass(frozen=True, kw_only=True)
class Site:
    """A normalization call.

    Attributes:
        path: module path; for a functional call, that of the module whose forward makes it and
            the call's name.
        type: class or function name.
        channels: number of channels, None if unknown.
        dim: channel dimension.
        reached: "graph" if the traced graph calls it, "slot" if it was found in the module tree
            only (the trace failed, or keeps the module around it whole), "never" if the trace
            shows that forward does not call it, "functional" for calls of torch.nn.functional.
        filtered: whether a filter stands behind it.
        refused: why no filter can be put there, or "".
    """

    path: str
    type: str
    channels: int | None
    dim: int
    reached: str
    filtered: bool
    refused: str = ""


def sites(model: nn.Module) -> list[Site]:
    """List every normalization call of a model, in the order of the module tree.

    Args:
        model: plain or wrapped; it is not changed.

    Returns:
        One `Site` per normalization module, then one per functional call.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        >>> [(site.path, site.channels) for site in sites(net)]
        [('1', 4)]
    """
    check_model(model)
    graphs = list(_graphs(model))
    called = set().union(*(calls(captured) for captured in graphs)) if graphs else set()
    found = [
        _module_site(path, module, _reached(path, called, len(graphs) == 2))
        for path, module in norm_modules(model)
    ]
    owners = sorted(_functional_owners(model, graphs))
    found += _scripted(model)
    return found + [site for path in owners for site in _functional_sites(model, path)]


def _scripted(model: nn.Module) -> Iterator[Site]:
    """Yield the normalization layers in scripted or traced parts, which take no filter."""
    why = "it is scripted: wrap the Python model, then script the pruned one"
    for path, module in model.named_modules():
        name = getattr(module, "original_name", "")
        if isinstance(module, torch.jit.ScriptModule) and (dim := dim_of_name(name)) is not None:
            yield Site(
                path=path,
                type=name,
                channels=None,
                dim=dim,
                reached="slot",
                filtered=False,
                refused=why,
            )


def norm_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each normalization module once, with its first path; not those inside another."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(outer) for outer in inside):
            continue
        if norm_spec(module) is not None:
            inside.append(path + "." if path else "")
            yield path, module


def select(
    candidates: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[str]:
    """Choose paths by glob patterns; a pattern also matches everything below a path.

    Raises:
        NoSiteError: if a pattern matches nothing; the message names the closest paths.

    Example:
        >>> select(["layer1.0.bn1", "layer2.0.bn1"], ["layer1"], None)
        ['layer1.0.bn1']
    """
    wanted, unwanted = strings("include", include), strings("exclude", exclude) or ()
    for pattern in (*(wanted or ()), *unwanted):
        if not any(_matches(path, pattern) for path in candidates):
            raise no_match(pattern, candidates)
    return [
        path
        for path in candidates
        if (wanted is None or any(_matches(path, p) for p in wanted))
        and not any(_matches(path, p) for p in unwanted)
    ]


def no_match(
    pattern: str,
    candidates: Sequence[str],
    listed: str = "prifu_plugin.sites(model) lists the normalization calls",
) -> NoSiteError:
    """Build the error for a pattern or path that matches nothing."""
    candidates = list(dict.fromkeys(path for path in candidates if path))
    close = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.3)
    return NoSiteError(
        f"'{pattern}' matches none of {len(candidates)} paths. Closest: "
        f"{', '.join(close) or ', '.join(candidates[:3]) or 'none'}. "
        f"{listed}."
    )


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, pattern + ".*")


def _graphs(model: nn.Module) -> Iterator[Captured]:
    """Trace in train and in eval mode, which may call different modules."""
    with undisturbed(model):
        for training in (True, False):
            model.train(training)
            try:
                yield capture(model)
            except CaptureError:
                continue


def _functional_owners(model: nn.Module, graphs: list[Captured], prefix: str = "") -> set[str]:
    """Return the paths of the modules whose forwards make, or name, functional normalizations.

    Where a forward cannot be traced, each of its children is looked at by itself.
    """
    if graphs:
        paths = {path for captured in graphs for path in functional_owners(captured.graph)}
        whole = set().union(*(calls(captured) for captured in graphs))
        paths |= {path for path in whole if _normalizes_inside(model.get_submodule(path))}
        return {(prefix + path).removesuffix(".") for path in paths}
    owners: set[str] = set()
    if _names_functional(model):
        owners.add(prefix.removesuffix("."))
    for name, child in model.named_children():
        if norm_spec(child) is None and any(True for _ in child.children()):
            owners |= _functional_owners(child, list(_graphs(child)), f"{prefix}{name}.")
        elif norm_spec(child) is None and _names_functional(child):
            owners.add(prefix + name)
    return owners


def _normalizes_inside(module: nn.Module) -> bool:
    """Whether a module that graphs keep whole normalizes what it is given, not a weight alone."""
    named = norm_spec(module) is None and _names_functional(module)
    return named and bool(functional_calls(module))


def _names_functional(module: nn.Module) -> bool:
    return names_functional(getattr(base_class(module), "forward", None))  # scripted ones have none


def _reached(path: str, called: set[str], complete: bool) -> str:
    if path in called:
        return "graph"
    parts = path.split(".")
    around = {".".join(parts[:count]) for count in range(len(parts))}
    return "slot" if around & called or not complete else "never"


def _module_site(path: str, module: nn.Module, reached: str) -> Site:
    spec = norm_spec(module)
    assert spec is not None
    channels = num_channels(module)
    return Site(
        path=path,
        type=base_class(module).__name__,
        channels=channels,
        dim=spec.dim,
        reached=reached,
        filtered=is_host(module) and isinstance(module._modules.get(CHILD), PriFU),
        refused="" if channels else "its number of channels is not known before a forward pass",
    )


def _functional_sites(model: nn.Module, path: str) -> Iterator[Site]:
    owner = model.get_submodule(path)
    prefix = f"{path}." if path else ""
    try:
        calls_made = functional_calls(owner)
    except CaptureError as error:
        yield Site(
            path=path,
            type=base_class(owner).__name__,
            channels=None,
            dim=1,
            reached="functional",
            filtered=False,
            refused=f"a functional normalization, but {error}",
        )
        return
    group = owner._modules.get(CHILD)
    for call in calls_made:
        unknown = "its arguments do not tell its number of channels"
        yield Site(
            path=prefix + call.name,
            type=call.function,
            channels=call.channels,
            dim=call.dim,
            reached="functional",
            filtered=isinstance(group, FilterGroup) and call.name in group,
            refused="" if call.channels else unknown,
        )
