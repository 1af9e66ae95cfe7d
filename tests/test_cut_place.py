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


class Gated(nn.Module):
    """Weighs channels by what is seen of all of them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(16, 16, 1)

    def forward(self, y):
        return y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()


class Zero(nn.Module):
    """Adds a branch that starts at 0."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Conv2d(16, 16, 1)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, y):
        return y + self.scale * self.branch(y)


MOVES = {
    "gated": (Gated(), 1),
    "with a branch that is 0": (Zero(), 1),
    "with noise": (lambda y: y + 0.1 * torch.randn_like(y), 1),
    "shuffled": (lambda y: F.channel_shuffle(y, 4).permute(0, 2, 3, 1), 3),
    "normalized": (lambda y: F.normalize(y, dim=1), 1),
    "convolved": (lambda y: F.conv2d(y, torch.ones(16, 16, 1, 1)), 1),
    "as it is": (lambda y: y, 1),
    "rectified": (lambda y: y.relu(), 1),
    "channels last": (lambda y: y.permute(0, 2, 3, 1), 3),
    "in between": (lambda y: y.permute(0, 2, 1, 3), 2),
    "tokens": (lambda y: y[:, :, :4, :4].flatten(2).transpose(1, 2), 2),
    "in one row": (lambda y: y[:, :, :1].permute(0, 2, 3, 1), 3),
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
    model = Moved(lambda y: y.softmax(1).flatten(2)[:, :, :16])
    x = torch.zeros(2, 3, 16, 16)
    model(x)
    with pytest.raises(ConfigError, match="Pass cut_dim="):
        prifu.wrap(model, cut="cut", example_inputs=x)
    wrapped = prifu.wrap(model, cut="cut", cut_dim=-1, example_inputs=x)
    assert prifu.filters(wrapped)["cut"].dim == 2


@pytest.mark.parametrize("size", [128, 144])
def test_as_many_tokens_as_channels(size):
    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=64, num_heads=2, depth=1, img_size=size, num_classes=2
    )
    wrapped = prifu.wrap(model, cut="patch_embed", example_inputs=torch.zeros(1, 3, size, size))
    assert prifu.filters(wrapped)["patch_embed"].dim == 2


@pytest.mark.parametrize("fill", [torch.zeros, torch.rand])
def test_a_network_with_gates_and_scales_at_zero(fill):
    model = timm.create_model("seresnet18", num_classes=2)
    wrapped = prifu.wrap(model, cut="layer1", example_inputs=fill(1, 3, 256, 256))
    assert prifu.filters(wrapped)["layer1"].dim == 1


def test_an_embedding_has_its_channels_last():
    model = nn.Sequential(nn.Embedding(50, 16), nn.LayerNorm(16))
    wrapped = prifu.wrap(model, cut="0", example_inputs=torch.randint(50, (2, 12)))
    assert (prifu.filters(wrapped)["0"].dim, len(prifu.filters(wrapped)["0"].weight)) == (2, 16)
