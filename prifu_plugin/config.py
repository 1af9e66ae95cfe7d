"""The settings of a filter, checked once at the public edge."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from prifu_plugin.arguments import number
from prifu_plugin.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """How filters behave; one value for a whole model.

    Attributes:
        alpha: threshold of Eq. 4, in [0, 1): a channel closes when W <= alpha * max(W).
        beta: decay of Eq. 6, at least 0; see `prifu_plugin.dose_to_beta`.
        init: initial W, above 0 (the paper's value is 0.1).
        bias: add a learnable, unfiltered bias per channel (the authors' published code).
        preserve: multiply by the fixed factor 1/init, so that a model computes at first what it
            computed before (False: the paper's bare initialization).
        noise: standard deviation of the Gaussian noise on the filtered upload, in units of W.
        decay: "decoupled", W <- W - lr * beta * W beside whatever the optimizer does; or "coupled",
            beta * W in the gradient, so that SGD's momentum carries it, as in the authors' code.

    Raises:
        ConfigError: if a value is outside its range.

    Example:
        >>> FilterConfig(alpha=0.2).gain
        10.0
    """

    alpha: float = 0.1
    beta: float = 1e-3
    init: float = 0.1
    bias: bool = False
    preserve: bool = True
    noise: float = 0.0
    decay: str = "decoupled"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "init", "noise"):  # plain floats go into plans as they are
            object.__setattr__(self, name, number(name, getattr(self, name)))
        _check("alpha", self.alpha, 0 <= self.alpha < 1, "in [0, 1)")
        _check("beta", self.beta, self.beta >= 0, "at least 0")
        _check("init", self.init, self.init > 0, "above 0")
        _check("noise", self.noise, self.noise >= 0, "at least 0")
        for name in ("bias", "preserve"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: pass {name}=True or False.")
        if self.decay not in ("decoupled", "coupled"):
            raise ConfigError(f"decay={self.decay!r}: pass 'decoupled' or 'coupled'.")

    @property
    def gain(self) -> float:
        """The fixed factor on W: 1/init when the function is preserved, else 1."""
        return 1.0 / self.init if self.preserve else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict that JSON can hold."""
        return asdict(self)


def _check(name: str, value: float, holds: bool, allowed: str) -> None:
    if not (holds and math.isfinite(value)):
        raise ConfigError(f"{name}={value!r} is not {allowed}. Pass {name}= a number {allowed}.")
