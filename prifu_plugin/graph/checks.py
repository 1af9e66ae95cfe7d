"""What must hold of a model before it is wrapped, and a run to learn the shape of a cut."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from prifu_plugin.arguments import tensors
from prifu_plugin.errors import ConfigError, OrderError, PrifuWarning, first_line
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.norms import norm_spec, num_channels
from prifu_plugin.graph.sites import no_match
from prifu_plugin.graph.state import input_shapes
from prifu_plugin.graph.undisturbed import undisturbed
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


def probe_cut(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | None,
    cut: str | None,
    cut_dim: int | None = None,
) -> tuple[int, int] | None:
    """Run the model once, unchanged; return channel dimension and channels of the cut."""
    if cut_dim is not None and (isinstance(cut_dim, bool) or not isinstance(cut_dim, int)):
        raise ConfigError(f"cut_dim={cut_dim!r} is no dimension: pass an integer.")
    inputs = _examples(model, example_inputs)
    if cut is None:
        _run_once(model, inputs)
        return None
    place = _place_of(model, cut)
    seen: list[Any] = []
    made_by: list[tuple[int, int]] = []
    handles = [
        module.register_forward_hook(_noting(made_by, seen))
        for module in model.modules()
        if _layer_channels(module, 4) is not None
    ]
    handles.append(place.register_forward_hook(lambda m, i, o: seen.append(o)))
    try:
        _run_once(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not seen or not isinstance(seen[0], Tensor) or seen[0].ndim < 2:
        raise ConfigError(
            f"cut='{cut}' ({type(place).__name__}) does not return one tensor (N, C, ...). "
            "Cut at a module that does."
        )
    if len(seen) > 1:
        raise ConfigError(
            f"cut='{cut}' ({type(place).__name__}) is called {len(seen)} times in one forward: one "
            "filter cannot stand for several tensors. Cut at a module around it, or give the place "
            "a module of its own, such as nn.Identity."
        )
    uploaded = seen[0]
    if cut_dim is not None and not -uploaded.ndim < cut_dim < uploaded.ndim or cut_dim == 0:
        raise ConfigError(
            f"cut_dim={cut_dim} is no channel dimension of {tuple(uploaded.shape)}, the output of "
            f"'{cut}'. Pass 1 for (N, C, ...) or -1 for (N, ..., C)."
        )
    dim = channel_dim(model, cut, uploaded, made_by) if cut_dim is None else cut_dim
    dim %= uploaded.ndim
    return dim, uploaded.shape[dim]


def _examples(model: nn.Module, given: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """Return the inputs given, or zeros of the shapes that are known."""
    if given is not None:
        return tensors("example_inputs", given)
    shapes = input_shapes(model)
    if shapes is None:
        raise ConfigError(
            "cut needs example_inputs: pass a batch, such as torch.zeros(2, 3, 224, 224)."
        )
    reference = next(model.parameters())
    return tuple(torch.zeros((2, *shape[1:])).to(reference) for shape in shapes)


def _place_of(model: nn.Module, cut: str) -> nn.Module:
    known = dict(model.named_modules())
    if cut not in known:
        raise no_match(cut, [path for path in known if path])
    if norm_spec(known[cut]) is not None:
        raise ConfigError(
            f"cut='{cut}' is a normalization layer, which gets a filter of its own. Cut at the "
            "module around it, or at the activation behind it."
        )
    place: nn.Module = known[cut]
    return place


def _run_once(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    try:
        with undisturbed(model), torch.no_grad():
            model.eval()
            model(*inputs)
    except Exception as error:
        shapes = [tuple(x.shape) for x in inputs]
        raise ConfigError(
            f"{type(model).__name__} refuses example_inputs of shape {shapes}: "
            f"{first_line(error)}. Pass a batch as the model "
            "takes it, (N, C, H, W)."
        ) from None


def _noting(made_by: list[tuple[int, int]], seen: list[Any]) -> Any:
    def note(layer: nn.Module, _: Any, out: Any) -> None:
        made = _layer_channels(layer, out.ndim) if isinstance(out, Tensor) else None
        if made is not None and not seen:
            made_by.append(made)

    return note


def channel_dim(
    model: nn.Module, cut: str, uploaded: Tensor, made_by: list[tuple[int, int]]
) -> int:
    """Return the channel dimension of an uploaded tensor.

    It is that of the layer before, the last one with channels that ran, unless its width is found
    elsewhere.

    Args:
        model: for the message.
        cut: path of the cut.
        uploaded: the tensor, (N, ...).
        made_by: (channel dimension, channels) of the layers that ran up to the cut.

    Raises:
        ConfigError: if several dimensions have that width, or none.
    """
    if uploaded.ndim == 2:
        return 1
    dim, channels = made_by[-1] if made_by else (1, uploaded.shape[1])
    dim %= uploaded.ndim
    if uploaded.shape[dim] == channels:
        return dim
    places = [d for d in range(1, uploaded.ndim) if uploaded.shape[d] == channels]
    if len(places) == 1:
        return places[0]
    raise ConfigError(
        f"cut='{cut}' of {type(model).__name__} returns {tuple(uploaded.shape)}, and which of these"
        " are the channels is not clear. Pass cut_dim=, 1 for (N, C, ...) or -1 for (N, ..., C)."
    )


def _layer_channels(layer: nn.Module, ndim: int) -> tuple[int, int] | None:
    """Return channel dimension and width of what a layer puts out, None for other modules."""
    spec = norm_spec(layer)
    if spec is not None:
        width = num_channels(layer)
        return None if width is None else (spec.dim_at(ndim), width)
    if isinstance(layer, nn.Linear):
        return -1, layer.out_features
    if isinstance(layer, nn.modules.conv._ConvNd):
        return 1, layer.out_channels
    return None
