"""The Privacy Filter Unit: Eq. 3 to 5 of Bi et al., ACM MM 2024."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prifu_plugin.arguments import number, whole_number
from prifu_plugin.config import FilterConfig
from prifu_plugin.errors import ConfigError, FilterError
from prifu_plugin.sharded import is_sharded, own_part, own_rows

LIVE_FILTERS: weakref.WeakSet[PriFU] = weakref.WeakSet()
"""Every filter in memory; the training hook finds an optimizer's filters here."""

WRAPPED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Every wrapped model in memory, to find out which parameters train beside a filter."""

STATE_FORMAT = 2.0
"""Version of what a checkpoint holds of a filter besides its tensors."""


def read_state(state: Any, known: float, lengths: tuple[int, ...]) -> list[float]:
    """Return the numbers that a checkpoint holds of a filter, behind their format.

    Args:
        state: what `get_extra_state` gave.
        known: the latest format that this version reads.
        lengths: how many numbers there may be.

    Raises:
        FilterError: if a later version wrote it, or it is none.

    Example:
        >>> read_state(torch.tensor([1.0, 0.5]), 2.0, (1,))
        [0.5]
    """
    numbers = state.tolist() if isinstance(state, Tensor) and state.ndim == 1 else []
    if numbers and numbers[0] > known:
        raise FilterError(
            f"The checkpoint's filters have format {numbers[0]:g}; this version of prifu_plugin "
            f"reads up to {known:g}. Upgrade it."
        )
    if len(numbers) - 1 not in lengths or not all(map(math.isfinite, numbers)):
        raise FilterError(
            f"The checkpoint is damaged: {state} is not what a filter writes of its settings. "
            "Load another checkpoint, or leave its '_extra_state' entries out."
        )
    return [float(number) for number in numbers[1:]]


class PriFU(nn.Module):
    """Weigh each channel and zero the light ones.

    Y_c = gain * RIW_c * X_c (+ bias_c), where RIW_c is W_c if W_c > alpha * max(W), else 0
    (Eq. 3 and 4). The comparison is strict and signed: a tie is closed, and so is a negative
    weight. The mask derives from W alone and is computed in fp32 or better. The decay of Eq. 6
    is applied around the optimizer's step by `prifu_plugin.decay`, which also remembers what was
    filtered (Eq. 11): it stays closed, here and in averages of this model, whatever becomes of W.

    A checkpoint holds W, what was filtered, and alpha, gain, dose and who holds the norm's scale;
    loading takes them over.

    Args:
        num_features: number of channels C.
        config: threshold, decay and form; the default is the paper's bare filter.
        dim: channel dimension of the input.
        image_dim: that of an input of four dimensions or more, where it is another.

    Attributes:
        weight: W, (C,), fp32 or better whatever the model's dtype.
        bias: (C,) or None.
        filtered: (C,), fp32 as averages of models need, 1 where training has filtered a channel;
            set to 0 to let W reopen it.
        initial: W at first.
        path: where `prifu_plugin.wrap` put the filter; "" for one made by hand.
        holds_scale: whether W took over the scale of its norm (`prifu_plugin.absorb`).
        frees_scale: whether that scale trains again once it is given back.

    Example:
        >>> unit = PriFU(3)
        >>> _ = unit.weight.data.copy_(torch.tensor([1.0, 0.05, 0.5]))
        >>> unit(torch.ones(1, 3, 2, 2))[0, :, 0, 0].tolist()
        [1.0, 0.0, 0.5]
        >>> unit
        PriFU(3, 2 open, alpha=0.1, beta=0.001)
    """

    bias: nn.Parameter | None
    filtered: Tensor

    def __init__(
        self,
        num_features: int,
        config: FilterConfig | None = None,
        *,
        dim: int = 1,
        image_dim: int | None = None,
    ) -> None:
        super().__init__()
        config = config or FilterConfig(preserve=False)
        num_features = whole_number("num_features", num_features)
        self.alpha = config.alpha
        self.beta = config.beta
        self.decay = config.decay
        self.gain = config.gain
        self.dim = dim
        self.image_dim = image_dim
        self.path = ""
        self.dose = 0.0
        self.stepped_alpha = 0.0  # at the last step, or that of a checkpoint
        self.holds_scale = False
        self.frees_scale = True
        self.origin: weakref.ref[nn.Parameter] | None = None
        self.initial = float(config.init)
        self.weight = nn.Parameter(torch.full((num_features,), self.initial))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(num_features)) if config.bias else None
        )
        # A number, not a bool: an average of it stays above 0 once a channel is filtered.
        self.register_buffer("filtered", torch.zeros(num_features))
        LIVE_FILTERS.add(self)

    def reset_parameters(self) -> None:
        """Open all channels with the initial weight."""
        with torch.no_grad():
            self.weight.fill_(self.initial)
            self.filtered.zero_()
            if self.bias is not None:
                self.bias.zero_()

    @property
    def alpha(self) -> float:
        """Threshold of Eq. 4, in [0, 1)."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._alpha = replace(_DEFAULT, alpha=value).alpha

    @property
    def beta(self) -> float:
        """Decay of Eq. 6, at least 0."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._beta = replace(_DEFAULT, beta=value).beta

    @property
    def gain(self) -> float:
        """Fixed factor on W, above 0."""
        return self._gain

    @gain.setter
    def gain(self, value: float) -> None:
        gain = number("gain", value)
        if not 0 < gain < math.inf:
            raise ConfigError(f"gain={value!r} is not above 0. Pass gain= a number above 0.")
        self._gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """Filter x along its channels; the result has the dtype of x."""
        dim = self.dim_at(x.ndim)
        scale = along(self.scale().to(x.dtype), x.ndim, dim)
        if self.bias is not None:
            return x * scale + along(self.bias.to(x.dtype), x.ndim, dim)
        # 0 times a negative number is -0, whose sign would tell of it.
        return torch.addcmul(x.new_zeros(()), x, scale)

    def dim_at(self, ndim: int) -> int:
        """Return the channel dimension of an input of `ndim` dimensions."""
        return self.dim if self.image_dim is None or ndim < 4 else self.image_dim

    def scale(self) -> Tensor:
        """Return gain * RIW, (C,), differentiable in W (Eq. 4 and 5)."""
        riw = self.weight.masked_fill(self.closed, 0.0)
        return riw if self.gain == 1 else riw * self.gain

    @property
    def closed(self) -> Tensor:
        """Mask of the channels that are zeroed, (C,), bool.

        Of a W that FSDP2 shards it is what the last step decided, without asking other processes.
        """
        weight = self.weight.detach()
        if is_sharded(weight):
            return self.filtered.bool()
        if weight.dtype not in _ROUNDED:
            return self.decide(weight)
        return torch.logical_or(weight <= 0, self.filtered)  # what rounding leaves of a threshold

    def decide(self, weight: Tensor) -> Tensor:
        """Return the mask that a step decides on, (C,), bool, given the whole W (Eq. 4)."""
        weight = weight.float() if weight.dtype in _ROUNDED else weight
        # "at most", and open what is not: a NaN stays visible instead of closing every channel.
        return torch.logical_or(weight <= self.alpha * weight.amax(0), self.filtered)

    @property
    def open(self) -> Tensor:
        """Mask of the channels that pass, (C,), bool."""
        return ~self.closed

    def check_finite(self) -> None:
        """Raise FilterError if a weight is NaN or infinite."""
        weight = self.weight.detach()
        bad = ~torch.isfinite(own_part(weight))
        if bad.any():
            channel = int(bad.nonzero()[0, 0]) + own_rows(weight).start
            raise FilterError(
                f"W of the filter at '{self.path or 'PriFU'}' is not finite at channel {channel} "
                f"of {self.weight.numel()}. Training diverged, or W was overwritten: lower the "
                "learning rate, or load the last checkpoint."
            )

    def extra_repr(self) -> str:
        """Say how many channels are open."""
        opened = "?" if self.weight.is_meta else int(self.open.sum())
        return f"{self.weight.numel()}, {opened} open, alpha={self.alpha}, beta={self.beta}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "origin": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        LIVE_FILTERS.add(self)

    def get_extra_state(self) -> Tensor:
        """Return what a checkpoint holds besides tensors, as one: the version, then settings."""
        settings = self.alpha, self.gain, self.dose, self.holds_scale, self.frees_scale
        return torch.tensor([STATE_FORMAT, *map(float, settings)], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over alpha, gain, dose and who holds the norm's scale from a checkpoint.

        Raises:
            FilterError: if a later version wrote it, or it is none.
        """
        settings = read_state(state, STATE_FORMAT, (3, 5))
        self.alpha, self.gain, self.dose = settings[:3]
        self.stepped_alpha = self.alpha
        if settings[3:]:  # since format 2
            if self.holds_scale and not settings[3]:
                self.lets_go = self.frees_scale  # `keep_fixed` frees the norm's scale
            self.holds_scale, self.frees_scale = map(bool, settings[3:])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PriFU:
        """Move like any module, but keep W and the bias in fp32 or better, and their values.

        What comes from the meta device has none and gets those a new filter has.
        """
        before = {name: p.data for name, p in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        if before["weight"].is_meta and not self.weight.is_meta:
            self.reset_parameters()
            return self
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.dtype in _ROUNDED:
                kept = before[name]
                kept = kept.float() if kept.dtype in _ROUNDED else kept
                parameter.data = kept.to(parameter.device)
                parameter.grad = None
        return self


_ROUNDED = (torch.float16, torch.bfloat16)
"""Types in which W may arrive rounded, under mixed precision: there exact zeros alone are closed,
alpha is applied to the fp32 W by the step."""
_DEFAULT = FilterConfig(preserve=False)


def along(vector: Tensor, ndim: int, dim: int) -> Tensor:
    """Reshape a (C,) vector so that it broadcasts along dimension `dim` of `ndim`."""
    shape = [1] * ndim
    shape[dim] = -1
    return vector.reshape(shape)
