"""The directions in which the server's first linear map can see an upload."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from prifu_plugin.errors import ConfigError

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Projection(nn.Module):
    """The coordinates of an upload that the server's first linear map can see.

    W z = (U S) (V^T z): the edge sends the r numbers V^T z, the server multiplies by U S. Exact
    but for rounding, and free; for a head of two classes with softmax one number would do. Of a
    map, channels are projected at each position, and nothing else: r is below C where a
    convolution has more input channels than outputs times kernel positions, while positions that
    its stride skips, and what its outputs share of neighbouring positions, are sent too.

    The weights are copied: make a new one when the layer has been trained on. A state dict of
    another rank can be loaded.

    Args:
        layer: the first layer the server applies to z: an nn.Linear to (N, ..., C), or a
            convolution without groups to (N, C, ...). It must be the only one that reads z.

    Raises:
        ConfigError: for other layers, weights that are not finite, and uploads that the layer
            would not take.

    Example:
        >>> head = nn.Linear(64, 2)
        >>> projection = Projection(head)
        >>> z = torch.randn(5, 64)
        >>> torch.allclose(projection.server()(projection(z)), head(z), atol=1e-5)
        True
        >>> Projection(nn.Conv2d(64, 16, 1))(torch.randn(5, 64, 4, 4)).shape
        torch.Size([5, 16, 4, 4])
    """

    basis: Tensor
    rest: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | Convolution) -> None:
        super().__init__()
        _check(layer)
        weight = layer.weight.detach().movedim(1, -1)  # inputs last
        left, values, right = torch.linalg.svd(weight.flatten(0, -2).double(), full_matrices=False)
        # What fp64 can tell from 0 counts: uploads may be large where the weights are small.
        smallest = max(left.shape[0], right.shape[1]) * torch.finfo(torch.float64).eps
        rank = max(1, int((values > values.max() * smallest).sum()))
        right = right * (values > 0)[:, None]  # of a layer that is 0 nothing is seen
        rest = (left * values)[:, :rank].unflatten(0, weight.shape[:-1]).movedim(-1, 1)
        self.register_buffer("basis", right[:rank].to(weight.dtype).contiguous())
        self.register_buffer("rest", rest.to(weight.dtype).contiguous())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.kind = type(layer)
        self.settings = _settings(layer)

    def forward(self, z: Tensor) -> Tensor:
        """Return the coordinates: (N, ..., r) before a linear layer, (N, r, ...) of a map."""
        linear = self.kind is nn.Linear
        channels = z.shape[-1 if linear else 1] if z.ndim > 1 else None
        if channels != self.basis.shape[1] or not z.is_floating_point():
            raise ConfigError(
                f"The projection is of a {self.kind.__name__} that takes {self.basis.shape[1]} "
                f"floating-point channels, and got {tuple(z.shape)} of {z.dtype}: make it of the "
                "layer that reads these uploads."
            )
        basis = self.basis.to(z.dtype)
        if linear:
            return z @ basis.T
        sent: Tensor = torch.tensordot(z, basis, dims=([1], [1]))
        return sent.movedim(-1, 1).contiguous()

    def server(self) -> nn.Linear | Convolution:
        """Return the layer that takes the place of the server's first one."""
        outputs, rank = self.rest.shape[:2]
        layer: nn.Linear | Convolution = nn.utils.skip_init(
            self.kind, rank, outputs, bias=self.bias is not None, **self.settings
        )
        layer.weight = nn.Parameter(self.rest.clone())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone())
        return layer

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, dim in (("basis", 0), ("rest", 1)):
            now, saved = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.ndim == now.ndim:
                shape = [*now.shape[:dim], saved.shape[dim], *now.shape[dim + 1 :]]
                setattr(self, name, now.new_empty(shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check(layer: Any) -> None:
    if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        raise ConfigError(
            f"The server's first layer is a {type(layer).__name__}: a projection needs the "
            "nn.Linear, or the convolution, that reads the upload."
        )
    if getattr(layer, "groups", 1) != 1:
        raise ConfigError(
            f"The server's first layer is a convolution of {layer.groups} groups: it sees every "
            "group for itself. Cut behind it, or in front of a layer without groups."
        )
    if not torch.isfinite(layer.weight).all():
        raise ConfigError(
            "The weights of the server's first layer are not all finite: nothing can be said of "
            "what it sees. Look at the training that made them."
        )


def _settings(layer: nn.Linear | Convolution) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {}
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {name: getattr(layer, name) for name in names}
