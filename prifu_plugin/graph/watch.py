"""What a wrapped model looks at when it runs: whether its filters are there, and are trained."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn

from prifu_plugin.errors import OrderError, PrifuWarning
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.host import is_host
from prifu_plugin.ownership import steps_of

PASSES = 300
"""Training passes without a step of the filters after which there is a warning."""


def check_filters_are_there(model: nn.Module, paths: tuple[str, ...]) -> None:
    """Raise OrderError if a layer that had a filter was replaced by one that has none.

    Freezing, fusing and reparameterizing functions make new layers, which would be unfiltered.
    Wrappers around parts (checkpointing, compiled parts) only move them.
    """
    places = _PLACES.get(model)
    if places is not None and all(map(_holds_filter, places)):
        return
    hosts = {
        id(child): (weakref.ref(owner), name)
        for owner in model.modules()
        for name, child in owner._modules.items()
        if child is not None and is_host(child)
    }
    if len(hosts) + is_host(model) < len(paths):
        known = dict(model.named_modules())
        path = next(p for p in paths if p not in known or not is_host(known[p]))
        there = f"a {type(known[path]).__name__} without one" if path in known else "nothing"
        raise OrderError(
            f"The filter at '{path}' is gone: {type(model).__name__} has {there} there now. "
            "Freeze, fuse and convert layers before wrap, or prune first; to freeze a wrapped "
            "norm, set requires_grad of its parameters and its mode."
        )
    _PLACES[model] = list(hosts.values())


_Place = tuple[weakref.ref[nn.Module], str]
_PLACES: weakref.WeakKeyDictionary[nn.Module, list[_Place]] = weakref.WeakKeyDictionary()
"""Model -> the owner of each filtered layer, by a weak reference, and the layer's name in it."""


def _holds_filter(place: _Place) -> bool:
    owner = place[0]()
    layer = owner._modules.get(place[1]) if owner is not None else None
    return layer is not None and is_host(layer)


def check_filters_train(model: nn.Module, state: Any) -> None:
    """Warn if a model is trained for long and no optimizer steps its filters.

    Hand-written steps, and those of a copy of W, are not seen by the hook.

    Raises:
        FilterError: if a W is not finite, so that a scaler skips all steps.
    """
    if not model.training or not torch.is_grad_enabled():
        return
    state.passes += 1
    if state.passes < PASSES:
        return
    every = [module for module in model.modules() if isinstance(module, PriFU)]
    units = [unit for unit in every if unit.weight.requires_grad]
    before, state.steps, state.passes = state.steps, sum(map(steps_of, units)), 0
    if every and not units and not any(unit.dose for unit in every):
        warnings.warn(
            f"{PASSES} training passes of {type(model).__name__}, and all of its filters are "
            "frozen, none of which has been trained before: none will close. Set requires_grad of "
            f"their W (first: '{every[0].path}.prifu.weight') before you build the optimizer, or "
            "prifu_plugin.unwrap the model.",
            PrifuWarning,
            stacklevel=2,
        )
    if units and state.steps == before:
        for unit in units:
            unit.check_finite()
        warnings.warn(
            f"{PASSES} training passes of {type(model).__name__}, and no optimizer has stepped its "
            f"filters (first: '{units[0].path}'): none will close. Build one of torch.optim's "
            "from model.parameters(), after wrap and after what replaces parameters; steps by "
            "hand, through functional_call or on copies of W are not seen.",
            PrifuWarning,
            stacklevel=2,
        )
