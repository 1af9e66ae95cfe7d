"""A narrow upload: the simplest way to send less."""

from __future__ import annotations

from torch import nn

from prifu_plugin.baselines.base import Defence
from prifu_plugin.baselines.vib import pointwise


class Bottleneck(Defence):
    """Put a linear map to few channels behind the edge, and one back before the cloud.

    Args:
        edge: images -> upload.
        cloud: upload -> logits.
        channels: of the given upload.
        spatial: whether it is (N, C, H, W).
        width: channels of the new upload.
    """

    def __init__(
        self, edge: nn.Module, cloud: nn.Module, *, channels: int, spatial: bool, width: int
    ) -> None:
        super().__init__(edge, cloud)
        self.edge = nn.Sequential(edge, pointwise(channels, width, spatial=spatial))
        self.cloud = nn.Sequential(pointwise(width, channels, spatial=spatial), cloud)
