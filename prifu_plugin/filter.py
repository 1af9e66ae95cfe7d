"""The Privacy Filter Unit: Eq. 3 to 5 of Bi et al., ACM MM 2024."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prifu_plugin.config import FilterConfig
from prifu_plugin.errors import FilterError

LIVE_FILTERS: weakref.WeakSet[PriFU] = weakref.WeakSet()
"""Every filter in memory; the training hook finds an optimizer's filters here."""


class PriFU(nn.Module):
    """Weigh each channel and zero the light ones.

    Y_c = gain * RIW_c * X_c (+ bias_c), where RIW_c is W_c if W_c > alpha * max(W), else 0
    (Eq. 3 and 4). The comparison is strict and signed: a tie is closed, and so is a negative
    weight. The mask derives from W alone and is computed in fp32 or better. The decay of Eq. 6
    is applied around the optimizer's step by `prifu_plugin.decay`.

    Args:
        num_features: number of channels C.
        config: threshold, decay and form; the default is the paper's bare filter.
        dim: channel dimension of the input.

    Attributes:
        weight: W, (C,), fp32 or better whatever the model's dtype.
        bias: (C,) or None.
        path: where `prifu_plugin.wrap` put the filter; "" for one made by hand.
        holds_scale: whether W took over the scale of its norm (`prifu_plugin.absorb`).

    Example:
        >>> unit = PriFU(3)
        >>> _ = unit.weight.data.copy_(torch.tensor([1.0, 0.05, 0.5]))
        >>> unit(torch.ones(1, 3, 2, 2))[0, :, 0, 0].tolist()
        [1.0, 0.0, 0.5]
        >>> unit
        PriFU(3, 2 open, alpha=0.1, beta=0.001)
    """

    bias: nn.Parameter | None

    def __init__(
        self, num_features: int, config: FilterConfig | None = None, *, dim: int = 1
    ) -> None:
        super().__init__()
        config = config or FilterConfig(preserve=False)
        self.alpha = config.alpha
        self.beta = config.beta
        self.gain = config.gain
        self.dim = dim
        self.path = ""
        self.dose = 0.0
        self.holds_scale = False
        self.neighbours: list[nn.Parameter] = []
        self.origin: weakref.ref[nn.Parameter] | None = None
        self.weight = nn.Parameter(torch.full((num_features,), float(config.init)))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(num_features)) if config.bias else None
        )
        LIVE_FILTERS.add(self)

    def forward(self, x: Tensor) -> Tensor:
        """Filter x along `dim`; the result has the dtype of x."""
        y = x * along(self.scale().to(x.dtype), x.ndim, self.dim)
        if self.bias is not None:
            y = y + along(self.bias.to(x.dtype), x.ndim, self.dim)
        return y

    def scale(self) -> Tensor:
        """Return gain * RIW, (C,), differentiable in W (Eq. 4 and 5)."""
        riw = self.weight.masked_fill(self.closed, 0.0)
        return riw if self.gain == 1 else riw * self.gain

    @property
    def closed(self) -> Tensor:
        """Mask of the channels that are zeroed, (C,), bool."""
        weight = self.weight.detach()
        # "at most", and open what is not: a NaN stays visible instead of closing every channel.
        return weight <= self.alpha * weight.amax()

    @property
    def open(self) -> Tensor:
        """Mask of the channels that pass, (C,), bool."""
        return ~self.closed

    def check_finite(self) -> None:
        """Raise FilterError if a weight is NaN or infinite."""
        bad = ~torch.isfinite(self.weight.detach())
        if bad.any():
            channel = int(bad.nonzero()[0, 0])
            raise FilterError(
                f"W of the filter at '{self.path or 'PriFU'}' is not finite at channel {channel} "
                f"of {self.weight.numel()}. Training diverged, or W was overwritten: lower the "
                "learning rate, or load the last checkpoint."
            )

    def known_neighbours(self) -> list[nn.Parameter]:
        """Return parameters of the same model, before and after it was wrapped."""
        origin = self.origin() if self.origin is not None else None
        return self.neighbours + ([origin] if origin is not None else [])

    def extra_repr(self) -> str:
        """Say how many channels are open."""
        opened = int(self.open.sum())
        return f"{self.weight.numel()}, {opened} open, alpha={self.alpha}, beta={self.beta}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "origin": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        LIVE_FILTERS.add(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PriFU:
        """Move like any module, but keep W and the bias in fp32 or better."""
        super()._apply(fn, recurse)
        for parameter in self.parameters(recurse=False):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
        return self


def along(vector: Tensor, ndim: int, dim: int) -> Tensor:
    """Reshape a (C,) vector so that it broadcasts along dimension `dim` of `ndim`."""
    shape = [1] * ndim
    shape[dim] = -1
    return vector.reshape(shape)
