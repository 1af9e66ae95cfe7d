"""Whether a model's weights have values that can be read, or trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase
from torch.nn.parameter import is_lazy

from prifu_plugin.errors import OrderError
from prifu_plugin.filter import PriFU


def check_trainable(model: nn.Module) -> None:
    """Raise OrderError for lazy norms, and for weights that were made in inference mode."""
    for path, module in model.named_modules():
        if isinstance(module, _LazyNormBase):
            _refuse_lazy(model, _tensors(module), f"{path}." if path else "")
    for path, tensor in _tensors(model):
        if not is_lazy(tensor) and tensor.is_inference():
            raise OrderError(
                f"'{path}' of {type(model).__name__} was made under torch.inference_mode and "
                "cannot be trained. Pass copy.deepcopy(model), made outside of it."
            )


def check_present(model: nn.Module) -> None:
    """Raise OrderError for lazy weights, and for weights that have a shape and no values."""
    _refuse_lazy(model, _tensors(model))
    check_not_meta(model)


def check_filters_present(model: nn.Module) -> None:
    """Raise OrderError for filters without values, whatever the rest of a model has."""
    for unit in model.modules():
        if isinstance(unit, PriFU):
            check_not_meta(unit)


def check_not_meta(model: nn.Module) -> None:
    """Raise OrderError for weights on the meta device."""
    for path, tensor in _tensors(model):
        if tensor.is_meta:
            raise OrderError(
                f"'{path}' of {type(model).__name__} is on the meta device, where weights have no "
                "values. Load them first: model.to_empty(device='cpu'), then load_state_dict."
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _refuse_lazy(model: nn.Module, tensors: Iterator[tuple[str, Tensor]], prefix: str = "") -> None:
    for path, tensor in tensors:
        if is_lazy(tensor):
            raise OrderError(
                f"'{prefix}{path}' of {type(model).__name__} is lazy and has no shape yet. Run the "
                "model on one batch first."
            )
