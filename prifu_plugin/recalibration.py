"""Running statistics of a model whose masks have closed since they were estimated."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from prifu_plugin.arguments import check_model
from prifu_plugin.batches import inputs
from prifu_plugin.cut import CutFilter
from prifu_plugin.device import device_of
from prifu_plugin.errors import ConfigError, PrifuWarning
from prifu_plugin.graph.values import check_not_meta
from prifu_plugin.prune.run import plan_of


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Estimate running statistics anew, by `torch.optim.swa_utils.update_bn` and for cut filters.

    Masks that close change what later layers see; statistics that are averages over training lag
    behind. Inputs pass in train mode, with noise; weights do not change.

    Args:
        model: a wrapped or pruned model; its modes are as before afterwards. Those of a filter on
            the upload are constants of a pruned model: recalibrate the wrapped one. Of a model in
            train mode, norms in eval mode are frozen, and keep what they have.
        batches: inputs (N, ...), or pairs whose first is the input.

    Returns:
        The model.

    Raises:
        ConfigError: if there are no batches, or they are no tensors. Whatever fails, the statistics
            are then what they were.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> _ = recalibrate(nn.Sequential(norm), [torch.full((4, 2), 3.0), torch.full((4, 2), 5.0)])
        >>> norm.running_mean.tolist()
        [4.0, 4.0]
    """
    check_model(model)
    check_not_meta(model)
    remaining = inputs(batches, device_of(model))
    first = next(remaining, None)
    if first is None:
        raise ConfigError("No batches to estimate statistics from: pass images.")
    cuts = [module for module in model.modules() if isinstance(module, CutFilter)]
    if _has_folded_cut(model):
        warnings.warn(
            "The filter on the upload is folded into this pruned model, and its statistics stay "
            "what they were: recalibrate the wrapped model, then prune it.",
            PrifuWarning,
            stacklevel=2,
        )
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    every = tqdm(
        itertools.chain([first], remaining),
        "recalibrating",
        len(batches) if isinstance(batches, Sized) else None,
        leave=False,
        disable=None,
    )
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    frozen = [norm for norm in norms if model.training and not norm.training]
    momenta = {norm: norm.momentum for norm in norms}
    stream = _counted(every, cuts, [(norm, _statistics(norm)) for norm in frozen])
    try:
        model.train()
        update_bn(stream, model)
        with torch.no_grad():
            for x in stream:  # update_bn takes none where no norm keeps statistics
                model(x)
    except BaseException:  # an interruption too
        _put_back(buffers)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for cut in cuts:
            cut.__dict__.pop("momentum", None)
    return model


def _has_folded_cut(model: nn.Module) -> bool:
    """Whether a model was pruned as one graph, with a filter on the upload."""
    try:
        return plan_of(model).recipe["cut"] is not None
    except ConfigError:
        return False


Statistics = list[tuple[Tensor, Tensor]]
"""Buffers of a norm, and what they held."""


def _statistics(norm: nn.Module) -> Statistics:
    return [(buffer, buffer.detach().clone()) for buffer in norm.buffers(recurse=False)]


def _put_back(buffers: Statistics) -> None:
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


def _counted(
    batches: Iterable[Tensor], cuts: list[CutFilter], frozen: list[tuple[nn.Module, Statistics]]
) -> Iterator[Tensor]:
    """Yield batches; what update_bn has done to frozen norms before the first is undone there."""
    for seen, batch in enumerate(batches, 1):
        for norm, statistics in frozen if seen == 1 else ():
            norm.eval()
            _put_back(statistics)
        for cut in cuts:  # a cumulative average, as update_bn makes of the norms'
            cut.momentum = 1 / seen
        yield batch
