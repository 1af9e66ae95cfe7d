"""A narrow upload: the simplest way to send less."""

from __future__ import annotations

from torch import nn

from prifu_plugin.baselines.base import Defence
from prifu_plugin.baselines.vib import pointwise


class Bottleneck(Defence):
    """Put a linear map to few channels behind the edge, and one back before the cloud.

    What is sent is standardized, since a narrow map of averages is mostly their mean: without it
    many starts do not learn.

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
        norm = (nn.BatchNorm2d if spatial else nn.BatchNorm1d)(width, affine=False)
        self.edge = nn.Sequential(edge, pointwise(channels, width, spatial=spatial), norm)
        self.cloud = nn.Sequential(pointwise(width, channels, spatial=spatial), cloud)
