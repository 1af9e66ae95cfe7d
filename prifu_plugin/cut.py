"""The filter on the uploaded tensor itself: standardize, weigh, add noise of a fixed scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prifu_plugin.config import FilterConfig
from prifu_plugin.filter import PriFU, along, read_state
from prifu_plugin.keyed import check_key, keyed_gaussian

CUT_FORMAT = 1.0
"""Of what a checkpoint holds of a cut besides tensors."""


class CutFilter(nn.Module):
    """Filter an uploaded tensor and limit its precision.

    The tensor is standardized per channel (running statistics, no affine parameters), weighed by
    a `PriFU`, and noise of standard deviation `noise` is added to the channels that are open:
    u_c = RIW_c * (x_c - mean_c) / std_c + noise * n. In the preserved form the receiver undoes
    the scale, z_c = u_c / init * std_c + mean_c, so that without noise the function is what it
    was. A closed channel is a constant either way. An open channel carries at most
    log2(1 + W_c^2 / noise^2) / 2 bits per position for Gaussian inputs of unit variance.

    Noise is drawn in training and at inference, anew for each query, so that averages over
    repeated queries undo it. With a secret `key`, what is drawn at inference is a function of the
    tensor, in coarse steps, and the key: the same query gets the same answer.

    Args:
        num_features: channels C of the uploaded tensor.
        config: form, threshold and noise.
        dim: channel dimension.

    Attributes:
        key: None, or 16 to 64 secret bytes of the edge (`secrets.token_bytes(32)`).

    Example:
        >>> cut = CutFilter(4, FilterConfig())
        >>> cut(torch.randn(8, 4)).shape
        torch.Size([8, 4])
    """

    running_mean: Tensor
    running_var: Tensor
    eps = 1e-5
    momentum = 0.1

    def __init__(self, num_features: int, config: FilterConfig, *, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.noise = config.noise
        self.restores = config.preserve
        self.key: bytes | None = None
        self.prifu = PriFU(num_features, config, dim=dim)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    @property
    def noise(self) -> float:
        """Standard deviation of the noise in units of W, at least 0."""
        return self._noise

    @noise.setter
    def noise(self, value: float) -> None:
        self._noise = FilterConfig(noise=value).noise

    def forward(self, x: Tensor) -> Tensor:
        """Return the filtered upload, shape and dtype of x."""
        mean, deviation = self._statistics(x)
        scale, shift, noise = (along(v, x.ndim, self.dim) for v in self._affine(mean, deviation))
        z = x * scale + shift
        if self.noise > 0:
            standard = (along(v, x.ndim, self.dim) for v in (mean, deviation))
            z = z + self._draw(x, z, *standard) * noise
        return z.to(x.dtype)

    def _draw(self, x: Tensor, z: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        if self.training or self.key is None:
            return torch.randn_like(z)
        return keyed_gaussian((x - mean) / deviation, check_key(self.key), self.noise).to(z)

    def get_extra_state(self) -> Tensor:
        """Return what a checkpoint holds besides tensors: the form, and the noise."""
        return torch.tensor([CUT_FORMAT, float(self.restores), self.noise], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over form and noise from a checkpoint, as filters do with alpha and gain.

        Raises:
            FilterError: if a later version wrote it, or it is none.
        """
        restores, self.noise = read_state(state, CUT_FORMAT, (2,))
        self.restores = bool(restores)

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return scale, shift and noise deviation per channel, each (C,), as in eval mode."""
        return self._affine(self.running_mean, (self.running_var + self.eps).sqrt())

    def bits(self) -> Tensor:
        """Return the bound in bits per channel and position, (C,); infinite without noise."""
        weight = self.prifu.scale().detach() / self.prifu.gain
        if self.noise == 0:
            return torch.where(weight > 0, torch.full_like(weight, float("inf")), weight)
        return 0.5 * torch.log2(1 + (weight / self.noise) ** 2)

    def _affine(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, bias, gain = self.prifu.scale(), self.prifu.bias, self.prifu.gain
        noise = torch.where(self.prifu.open, self.noise * gain, 0.0).to(scale)
        shift = torch.zeros_like(scale) if bias is None else bias
        if not self.restores:
            return scale / deviation, shift - mean * scale / deviation, noise
        return scale, shift + mean - mean * scale, noise * deviation

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.running_mean, (self.running_var + self.eps).sqrt()
        others = [d for d in range(x.ndim) if d != self.dim % x.ndim]
        var, mean = torch.var_mean(x.float(), others, correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(var.to(self.running_var), self.momentum)
        return mean, (var + self.eps).sqrt()

    def extra_repr(self) -> str:
        """Say where the filter stands and how much noise it adds."""
        return f"dim={self.dim}, noise={self.noise}"
