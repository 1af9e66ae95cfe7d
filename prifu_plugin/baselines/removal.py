"""Removing channels or directions of an upload after training: no method is simpler."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from prifu_plugin.device import device_of
from prifu_plugin.errors import ConfigError
from prifu_plugin.filter import along


class _Keep(nn.Module):
    """Multiply channels by a mask, or project them on a few directions."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, z: Tensor) -> Tensor:
        """Return the upload with the rest removed, in the shape of z."""
        if z.ndim < 2 or z.shape[1] != self.matrix.shape[-1]:
            raise ConfigError(
                f"The upload is {tuple(z.shape)}, and what to keep is said of "
                f"{self.matrix.shape[-1]} channels: pass the relevance of the channels there."
            )
        if self.matrix.ndim == 1:
            return z * along(self.matrix, z.ndim, 1)
        return torch.einsum("nc...,dc->nd...", z, self.matrix)


def keep_channels(edge: nn.Module, relevance: Tensor, count: int) -> nn.Module:
    """Zero all but the channels of the highest relevance (Fig. 3 of the paper).

    Args:
        edge: images -> upload.
        relevance: of each channel of the upload, (C,): AvgRI, or random numbers for the control.
        count: how many channels stay.

    Example:
        >>> edge = keep_channels(nn.Identity(), torch.tensor([0.1, 0.3, 0.2]), 1)
        >>> edge(torch.ones(1, 3)).tolist()
        [[0.0, 1.0, 0.0]]
    """
    if not 0 < count <= len(relevance):
        raise ConfigError(f"count={count} of {len(relevance)} channels: keep at least one.")
    mask = torch.zeros(len(relevance), device=device_of(edge))
    mask[relevance.argsort(descending=True)[:count].to(mask.device)] = 1
    return nn.Sequential(edge, _Keep(mask)).eval()


def keep_directions(edge: nn.Module, cloud: fx.GraphModule, count: int) -> nn.Module:
    """Keep the part of an upload that the cloud's first linear map sees best.

    The obfuscation of Samragh et al. (arXiv 2104.11413) with a fixed number of directions: z is
    projected on the first right singular vectors of that map, all positions alike. Directions
    chosen for each image would tell of it by the choice.

    Args:
        edge: images -> upload.
        cloud: from `prifu_plugin.split`; every reader of the upload must be a convolution or a
            linear layer.
        count: of directions; the rank of the map keeps the function exactly.
    """
    seen = server_map(cloud).double()
    if not 0 < count <= seen.shape[1]:
        raise ConfigError(f"count={count} of {seen.shape[1]} directions: keep at least one.")
    right = torch.linalg.svd(seen, full_matrices=False).Vh[:count]
    return nn.Sequential(edge, _Keep((right.T @ right).float())).eval()


def server_map(cloud: fx.GraphModule) -> Tensor:
    """Return the weights by which a cloud first reads its upload, (rows, C)."""
    upload = next(node for node in cloud.graph.nodes if node.op == "placeholder")
    readers, open_nodes = [], [upload]
    while open_nodes:
        for user in open_nodes.pop().users:
            if user.op == "call_method" and user.target in ("clone", "size"):
                open_nodes += [user] if user.target == "clone" else []
            elif user.op == "call_module" and isinstance(
                cloud.get_submodule(str(user.target)), nn.Dropout | nn.Identity
            ):
                open_nodes.append(user)
            else:
                readers.append(user)
    found = []
    for node in readers:
        layer = cloud.get_submodule(str(node.target)) if node.op == "call_module" else None
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
        if not isinstance(layer, nn.Conv2d | nn.Linear) or grouped:
            raise ConfigError(
                f"The cloud reads its upload by '{node.name}', which is no plain convolution or "
                "linear layer: no few directions hold what it sees. Cut elsewhere."
            )
        found.append(layer.weight.detach().movedim(1, -1).flatten(0, -2))
    return torch.cat(found)
