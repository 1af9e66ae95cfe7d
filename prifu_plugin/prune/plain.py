"""Layers as they are in eval mode: computed weights become their values."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def plain_layers(model: nn.Module) -> nn.Module:
    """Replace computed weights by their values, in place: parametrizations, old-style norms, masks.

    What they compute from does not change in eval mode. Compiled children become what they were
    compiled from, which is what a graph is made of.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if is_compiled(child):
                setattr(module, name, child._orig_mod)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _drop_parametrizations(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                nn.utils.remove_spectral_norm(module, hook.name)
            elif isinstance(hook, BasePruningMethod):
                torch.nn.utils.prune.remove(module, hook._tensor_name)
    return model


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile(module) made a module."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # there if anything was compiled
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def _drop_parametrizations(module: Any) -> None:
    """Do what torch's remove_parametrizations does, which breaks the model this is a copy of."""
    values = {name: getattr(module, name).detach() for name in module.parametrizations}
    trained = any(p.requires_grad for p in module.parametrizations.parameters())
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value.clone(), trained))
