"""What wrap remembers on a model, and the two hooks that go with it."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from prifu_plugin.arguments import check_model
from prifu_plugin.config import FilterConfig
from prifu_plugin.errors import OrderError
from prifu_plugin.filter import WRAPPED, PriFU
from prifu_plugin.graph.host import is_host, keep_fixed
from prifu_plugin.graph.patches import PATCHING
from prifu_plugin.graph.watch import check_filters_are_there, check_filters_train
from prifu_plugin.names import CHILD, is_of_filter

STATE = "_prifu_state"
META = "_prifu_pruned"
"""Where prune keeps plan and report on its result."""


@dataclass
class WrapState:
    """What wrap remembers on the model: its settings, the inputs it last saw, how it trains."""

    config: FilterConfig
    paths: tuple[str, ...]
    cut: str | None = None
    cut_dim: int = 1
    cut_channels: int = 0
    hooks: dict[str, int] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    passes: int = 0
    steps: int = 0
    input_shapes: tuple[tuple[int, ...], ...] | None = None

    def recipe(self) -> dict[str, Any]:
        """Return what `apply_recipe` needs to wrap a fresh model alike."""
        return {
            "config": self.config.to_dict(),
            "paths": list(self.paths),
            "cut": self.cut,
            "cut_dim": self.cut_dim,
            "cut_channels": self.cut_channels,
        }


def copied(model: nn.Module) -> nn.Module:
    """Copy a model, also one that holds computed tensors, which torch refuses to copy.

    Old-style weight norms and pruning masks leave some, and so do forwards that store results.
    """
    original: Any = Tensor.__deepcopy__

    def copy_computed(self: Tensor, memo: dict[int, Any]) -> Any:
        return original(self if self.is_leaf else self.detach(), memo)

    with PATCHING, mock.patch.object(Tensor, "__deepcopy__", copy_computed), torch.no_grad():
        copy_of = copy.deepcopy(model, emptied(model))
    # Scripted modules copy their parameters by an operation, which has a gradient or is none.
    for old, new in zip(model.parameters(), copy_of.parameters(), strict=True):
        if new.requires_grad is not old.requires_grad:
            new.requires_grad_(old.requires_grad)
    return copy_of


def emptied(model: nn.Module) -> dict[int, Any]:
    """Return a memo for copy.deepcopy with new empty containers for those of modules.

    It copies what holds nothing, a dozen tables of hooks for each module, as slowly as the rest.
    """
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(value): type(value)() for value in held if type(value) in _TABLES and not value}


_TABLES = (OrderedDict, dict, set)


def wrap_state(model: nn.Module) -> WrapState:
    """Return what wrap remembered, or raise OrderError if the model is not wrapped."""
    check_model(model)
    state = model.__dict__.get(STATE)
    if not isinstance(state, WrapState):
        if META in model.__dict__:
            raise OrderError(
                f"This {type(model).__name__} is pruned already, and has no filters left. Pass the "
                "wrapped model, or wrap the pruned one again to filter further."
            )
        raise OrderError(
            f"{type(model).__name__} is not wrapped. Call prifu_plugin.wrap(model) first; if it "
            "is inside DDP, torch.compile or EMA, pass the module inside."
        )
    return state


def input_shapes(model: nn.Module) -> tuple[tuple[int, ...], ...] | None:
    """Return the input shapes of the last forward pass, or of timm's pretrained_cfg."""
    state = model.__dict__.get(STATE)
    if isinstance(state, WrapState) and state.input_shapes is not None:
        return state.input_shapes
    settings = getattr(model, "pretrained_cfg", None)
    if not isinstance(settings, dict) or settings.get("input_size") is None:
        return None
    size = settings["input_size"]
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    spatial = tuple(fixed) if isinstance(fixed, tuple) else tuple(size[1:])
    first = dict(model.named_modules()).get(str(settings.get("first_conv")))
    channels = getattr(first, "in_channels", size[0])
    return ((1, channels, *spatial),)


def remember_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> None:
    """Note the shapes of a forward pass, for prune, and look at the filters (a pre-hook)."""
    if torch.compiler.is_compiling():
        return
    state = model.__dict__[STATE]
    if kwargs:
        args = _by_position(model, args, kwargs)
    if args and all(isinstance(x, Tensor) and x.is_floating_point() for x in args):
        state.input_shapes = tuple(tuple(x.shape) for x in args)
    check_filters_are_there(model, state.hosts)
    check_filters_train(model, state)
    WRAPPED.add(model)  # a copy of a wrapped model is one, too


def _by_position(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the tensors that a forward is given, by position; what its defaults do is left out."""
    try:
        given = list(inspect.signature(model.forward).bind(*args, **kwargs).args)
    except (TypeError, ValueError):
        return args
    while given and not isinstance(given[-1], Tensor):
        given.pop()
    return tuple(given) if len(given) > len(args) else args


def fix_scales(model: nn.Module, _: Any) -> None:
    """Freeze the norm scales that filters have absorbed, after loading a checkpoint (a hook)."""
    for host in model.modules():
        if is_host(host) and isinstance(unit := host._modules.get(CHILD), PriFU):
            keep_fixed(host, unit)


def complete_checkpoint(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a checkpoint from before wrap load, keeping our filters, and one from before a version.

    A filter that the checkpoint has is completed with what it does not have of it yet.

    Raises:
        OrderError: if it brings norms a scale that our filters hold already.
    """
    ours = {k: v for k, v in model.state_dict().items() if is_of_filter(k)}
    for key in ours:  # torch.distributed.checkpoint puts a word where it found no extra state
        if not isinstance(state_dict.get(prefix + key, torch.empty(0)), Tensor):
            del state_dict[prefix + key]
    known = [key for key in ours if prefix + key in state_dict]
    if not known:
        _check_scales(model, state_dict, prefix)
    for key, value in ours.items():
        if not known:
            state_dict[prefix + key] = value
        elif key.endswith(".filtered"):
            state_dict.setdefault(prefix + key, torch.zeros_like(value))
        elif key.endswith("._extra_state"):
            state_dict.setdefault(prefix + key, value)


def _check_scales(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    for path, host in model.named_modules():
        unit = host._modules.get(CHILD) if is_host(host) else None
        holds = isinstance(unit, PriFU) and unit.holds_scale
        if holds and f"{prefix}{path}{'.' if path else ''}weight" in state_dict:
            raise OrderError(
                f"The checkpoint is of a model without filters and has the scale of '{path}', "
                "which its filter has absorbed: it would count twice. Load it before absorb, or "
                "before wrap."
            )
