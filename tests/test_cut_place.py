"""Which dimension of an upload are the channels, where several are as wide."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import ConfigError


class Moved(nn.Module):
    """A convolution to 16 channels on 16 places each way, then what `move` makes of it."""

    def __init__(self, move):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.cut = nn.Identity()
        self.move = move
        self.head = nn.LazyLinear(2)

    def forward(self, x):
        return self.head(self.cut(self.move(self.norm(self.stem(x)))).flatten(1))


MOVES = {
    "as it is": (lambda y: y, 1),
    "rectified": (lambda y: y.relu(), 1),
    "channels last": (lambda y: y.permute(0, 2, 3, 1), 3),
    "in between": (lambda y: y.permute(0, 2, 1, 3), 2),
    "tokens": (lambda y: y[:, :, :4, :4].flatten(2).transpose(1, 2), 2),
    "signals": (lambda y: y[:, :, :4, :4].flatten(2), 1),
    "pooled": (lambda y: F.max_pool2d(y.permute(0, 3, 1, 2), (1, 1)), 2),
}


@pytest.mark.parametrize("move", MOVES)
def test_the_channels_are_found_by_what_moves(move):
    made, dim = MOVES[move]
    x = torch.zeros(2, 3, 16, 16)
    model = Moved(made)
    model(x)
    assert prifu.filters(prifu.wrap(model, cut="cut", example_inputs=x))["cut"].dim == dim


def test_it_is_asked_for_where_channels_are_mixed():
    model = Moved(lambda y: y.softmax(1))
    x = torch.zeros(2, 3, 16, 16)
    model(x)
    with pytest.raises(ConfigError, match="Pass cut_dim="):
        prifu.wrap(model, cut="cut", example_inputs=x)
    wrapped = prifu.wrap(model, cut="cut", cut_dim=-1, example_inputs=x)
    assert prifu.filters(wrapped)["cut"].dim == 3


@pytest.mark.parametrize("size", [128, 144])
def test_as_many_tokens_as_channels(size):
    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=64, num_heads=2, depth=1, img_size=size, num_classes=2
    )
    wrapped = prifu.wrap(model, cut="patch_embed", example_inputs=torch.zeros(1, 3, size, size))
    assert prifu.filters(wrapped)["patch_embed"].dim == 2
