"""What must hold of a model before it is wrapped."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from prifu_plugin.errors import OrderError, PrifuWarning
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.values import check_trainable
from prifu_plugin.sharded import is_sharded


def check_wrappable(model: nn.Module) -> None:
    """Raise OrderError if a model is scripted, exported, wrapped, or cannot be trained yet."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise OrderError(f"{name} is scripted: wrap the Python model, then script the pruned one.")
    for path, part in model.named_modules():
        if isinstance(part, fx.GraphModule) and "train" in vars(part):  # of torch.export
            what = f"'{path}' of {name}" if path else name
            raise OrderError(f"{what} is exported: wrap the original, then export the pruned one.")
    for attribute, words in (
        ("_orig_mod", "torch.compile"),
        ("module", "DDP, DataParallel or EMA"),
    ):
        inner = model._modules.get(attribute)
        if inner is not None and _is_wrapper(model):
            raise OrderError(
                f"{name} is a {words} wrapper around {type(inner).__name__}. Wrap the model "
                f"inside first, prifu_plugin.wrap(model.{attribute}), then wrap it again."
            )
    check_trainable(model)
    sharded = next((path for path, p in model.named_parameters() if is_sharded(p)), None)
    if sharded is not None:
        raise OrderError(
            f"'{sharded}' of {name} is sharded by FSDP already: filters would not be. Call "
            "prifu_plugin.wrap(model) on the whole model first, then fully_shard."
        )
    for path, module in model.named_modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            raise OrderError(
                f"{name} is sharded by FSDP, at '{path}'. Call prifu_plugin.wrap(model) first, "
                "then fully_shard."
            )
        if isinstance(module, PriFU):
            raise OrderError(
                f"{name} has a filter already, at '{path}'. Call prifu_plugin.unwrap(model) "
                "first, or set alpha and beta on prifu_plugin.filters(model)."
            )


def check_alone(model: nn.Module) -> None:
    """Raise OrderError if DDP holds a model whose place filters are to be put into.

    DDP takes note of the parameters there are when it is made; later ones are never averaged.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    parts = set(model.modules())
    for other in _instances(_subclasses(nn.parallel.DistributedDataParallel)):
        if other.module in parts or any(module is model for module in other.module.modules()):
            raise OrderError(
                f"{type(model).__name__} is inside DDP already, which would not average the "
                "filters' weights over processes. Call prifu_plugin.wrap first, then make the DDP."
            )


def warn_of_wrappers(model: nn.Module) -> None:
    """Warn of averages, DDP or compiled forms of a model that were made before it is wrapped."""
    for other in _instances({cls for cls in _subclasses(nn.Module) if _wraps(cls)}):
        modules = other.__dict__.get("_modules", {})
        inner = modules.get("module", modules.get("_orig_mod"))
        if isinstance(inner, nn.Module) and (inner is model or _is_copy(inner, model)):
            warnings.warn(
                f"A {type(other).__name__} of this {type(model).__name__} was made before wrap: it "
                "has no filters, and an average would pair weights with the wrong ones. Make it "
                "again, from the wrapped model.",
                PrifuWarning,
                stacklevel=3,
            )
            return


def _is_wrapper(module: Any) -> bool:
    """Whether a module is one that stands around another: a child named so is none."""
    return _wraps(type(module))


def _wraps(cls: type) -> bool:
    names = [base.__name__ for base in cls.__mro__]
    return any(name in _WRAPPERS or name.startswith("ModelEma") for name in names)


def _instances(classes: set[type]) -> list[Any]:
    """Return what exists of classes: an object refers to its own, and scanning for that is C."""
    return [one for one in gc.get_referrers(*classes) if type(one) in classes]


def _subclasses(cls: type) -> set[type]:
    """Return a class and all that inherit from it."""
    found, left = {cls}, [cls]
    while left:
        new: set[type] = set(type.__subclasses__(left.pop())) - found
        found |= new
        left += new
    return found


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "AveragedModel", "OptimizedModule")


def _is_copy(one: nn.Module, other: nn.Module) -> bool:
    if type(one) is not type(other):
        return False
    left = dict(one.named_parameters(remove_duplicate=False))
    right = dict(other.named_parameters(remove_duplicate=False))
    if not left or left.keys() != right.keys():
        return False
    pairs = [(parameter, right[name]) for name, parameter in left.items()]
    if any(isinstance(p, UninitializedParameter) or p.is_meta for pair in pairs for p in pair):
        return False
    if any(a.shape != b.shape for a, b in pairs):
        return False
    # Scales and shifts begin alike in all models, and tell nothing where there are others.
    telling = [(a, b) for a, b in pairs if a.ndim > 1] or pairs
    return all(_are_alike(a, b) for a, b in telling)


def _are_alike(one: Tensor, other: Tensor) -> bool:
    """Whether weights are near: those of a model of its own are at right angles."""
    a, b = (p.detach().cpu().double().flatten() for p in (one, other))
    return torch.equal(a, b) or bool(a @ b > ALIKE * a.norm() * b.norm())


ALIKE = 0.5
"""Cosine of weights above which one was made from the other."""
