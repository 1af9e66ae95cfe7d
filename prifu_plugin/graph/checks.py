"""What must hold of a model before it is wrapped, and a run to learn the shape of a cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prifu_plugin.errors import ConfigError, OrderError
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.norms import norm_spec
from prifu_plugin.graph.sites import no_match
from prifu_plugin.graph.state import input_shapes


def check_wrappable(model: nn.Module) -> None:
    """Raise OrderError if a model is scripted, inside a wrapper of another kind, or filtered."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise OrderError(f"{name} is scripted: wrap the Python model, then script the pruned one.")
    for attribute, words in (
        ("_orig_mod", "torch.compile"),
        ("module", "DDP, DataParallel or EMA"),
    ):
        inner = model._modules.get(attribute)
        if inner is not None and len(model._modules) == 1:
            raise OrderError(
                f"{name} is a {words} wrapper around {type(inner).__name__}. Wrap the model "
                f"inside first, prifu_plugin.wrap(model.{attribute}), then wrap it again."
            )
    for path, module in model.named_modules():
        if isinstance(module, PriFU):
            raise OrderError(
                f"{name} has a filter already, at '{path}'. Call prifu_plugin.unwrap(model) "
                "first, or set alpha and beta on prifu_plugin.filters(model)."
            )


def probe_cut(
    model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...] | None, cut: str | None
) -> Tensor | None:
    """Run the model once, unchanged, and return the output of the cut."""
    if example_inputs is None:
        shapes = input_shapes(model)
        if shapes is None:
            raise ConfigError(
                "cut needs example_inputs: pass a batch, such as torch.zeros(2, 3, 224, 224)."
            )
        reference = next(model.parameters())
        example_inputs = tuple(torch.zeros((2, *s[1:])).to(reference) for s in shapes)
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    known = dict(model.named_modules())
    if cut is not None and cut not in known:
        raise no_match(cut, [path for path in known if path])
    if cut is not None and norm_spec(known[cut]) is not None:
        raise ConfigError(
            f"cut='{cut}' is a normalization layer, which gets a filter of its own. Cut at the "
            "module around it, or at the activation behind it."
        )
    seen: list[Any] = []
    handles = []
    if cut is not None:
        handles.append(known[cut].register_forward_hook(lambda m, i, o: seen.append(o)))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(*example_inputs)
    except Exception as error:
        shapes_given = [tuple(x.shape) for x in example_inputs]
        raise ConfigError(
            f"{type(model).__name__} refuses example_inputs of shape {shapes_given}: "
            f"{str(error).splitlines()[0]}. Pass a batch as the model takes it, (N, C, H, W)."
        ) from None
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if cut is None:
        return None
    if not seen or not isinstance(seen[0], Tensor) or seen[0].ndim < 2:
        raise ConfigError(
            f"cut='{cut}' ({type(known[cut]).__name__}) does not return one tensor (N, C, ...). "
            "Cut at a module that does."
        )
    return seen[0]


def channel_dim(x: Tensor) -> int:
    """Return the channel dimension of an uploaded tensor: 1, or -1 for tokens (N, L, C)."""
    return x.ndim - 1 if x.ndim == 3 else 1
