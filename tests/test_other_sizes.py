"""At sizes that no run has seen, pruned and cut models are exact or refuse; they do not guess."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.guards import is_refusal
from prifu_plugin.prune.verify import difference


class Net(nn.Module):
    """A filtered layer, a body that looks at sizes, and a head."""

    def __init__(self, body, inputs=3):
        super().__init__()
        self.first, self.norm = nn.Conv2d(inputs, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.next, self.last = nn.Conv2d(6, 4, 3, padding=1), nn.Linear(4, 3)
        self.body = body

    def features(self, x):
        return self.norm(self.first(x))

    def scores(self, y):
        return self.last(self.next(y).mean((2, 3)))

    def forward(self, *inputs):
        return self.body(self, *inputs)


def padded_to_even(net, x):
    """Sequences whose last dimension is padded: no run has varied it."""
    x = x.unsqueeze(1)
    if x.shape[-1] % 2:
        x = F.pad(x, (0, 1))
    return net.scores(net.features(x).relu())


def cropped(net, x):
    y = net.features(x)[:, :, :16, :16]
    return net.scores(y * 2 if y.shape[2] < 16 else y)


def as_often_as_columns(net, x, table):
    y = net.scores(net.features(x))
    for column in range(table.shape[1]):
        y = y + table[:, column : column + 1]
    return y


def scaled_bytes(net, x):
    if x.dtype == torch.uint8:
        x = x / 255
    return net.scores(net.features(x.to(net.last.weight.dtype)))


def padded_behind_a_layer(net, x):
    return net.scores(F.pad(net.features(x), (0, 0, 0, -x.shape[2] % 8)))


def padded_by_the_difference(net, x):
    y = net.features(x).relu()
    z = F.interpolate(F.max_pool2d(y, 2), scale_factor=2)
    missing = y.shape[2] - z.shape[2]
    z = F.pad(z, (0, 0, missing // 2, missing - missing // 2))
    return net.scores(torch.cat([y, z], 1)[:, 3:9])


def all_parts_but_the_first(net, x):
    y, total = net.next(net.features(x)), 0
    for part in y.split(8, 2)[1:]:
        total = total + part.mean((2, 3))
    return net.last(total)


def parts_by_name(net, x):
    first, second = torch.chunk(input=net.features(x), chunks=2, dim=1)
    y = torch.cat([first, second], 1)
    return net.scores(y * 2 if x.shape[2] % 2 else y)


def scaled_by_a_size(net, x):
    y = net.features(F.max_pool2d(x, 32))
    return net.last(net.next(y).sum((2, 3)) / y.shape[2])


def scaled_by_parity(net, x):
    return net.scores(net.features(x)) * (1 + x.shape[2] % 2)


def draw(*shapes):
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


BYTES = (torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8),)
CASES = {
    "the last dimension": (padded_to_even, 1, draw((2, 12, 8)), draw((2, 12, 7))),
    "a crop": (cropped, 3, draw((2, 3, 32, 32)), draw((2, 3, 8, 8))),
    "another input": (
        as_often_as_columns, 3, draw((2, 3, 8, 8), (2, 3)), draw((2, 3, 8, 8), (2, 5)),
    ),
    "a type": (scaled_bytes, 3, draw((2, 3, 8, 8)), BYTES),
    "padding to multiples": (padded_behind_a_layer, 3, draw((2, 3, 8, 8)), draw((2, 3, 9, 8))),
    "a U-Net": (padded_by_the_difference, 3, draw((2, 3, 32, 32)), draw((1, 3, 35, 32))),
    "parts that are sliced": (
        all_parts_but_the_first, 3, draw((2, 3, 32, 32)), draw((2, 3, 48, 32)),
    ),
    "parts by name": (parts_by_name, 3, draw((2, 3, 8, 8)), draw((2, 3, 10, 8))),
    "a size behind the cut": (scaled_by_a_size, 3, draw((2, 3, 64, 64)), draw((5, 3, 64, 64))),
    "parity": (scaled_by_parity, 3, draw((2, 3, 8, 8)), draw((2, 3, 9, 8))),
}  # fmt: skip


def filtered(body, inputs=3):
    torch.manual_seed(0)
    model = prifu.wrap(Net(body, inputs).double()).eval()
    prifu.filters(model)["norm"].weight.data[::2] = 0.0
    return model


def exact_or_refused(model, other, inputs):
    try:
        found = other(*inputs)
    except AssertionError as error:
        if not is_refusal(error):
            raise
    else:
        assert difference(model(*inputs), found) <= 1e-11


@pytest.mark.parametrize("case", CASES)
def test_a_pruned_model_knows_its_sizes(case):
    body, width, seen, unseen = CASES[case]
    model = filtered(body, width)
    pruned = prifu.prune(model, seen)
    assert difference(model(*seen), pruned(*seen)) <= 1e-11
    exact_or_refused(model, pruned, unseen)


@pytest.mark.parametrize("case", [name for name in CASES if name != "another input"])
def test_a_cut_model_knows_its_sizes(case):
    body, width, seen, unseen = CASES[case]
    model = filtered(body, width)
    edge, cloud = prifu.split(model, "norm", seen)
    assert difference(model(*seen), cloud(edge(*seen))) <= 1e-11
    exact_or_refused(model, lambda x: cloud(edge(x)), unseen)


def test_the_cloud_takes_the_batch_for_the_batch():
    model = filtered(scaled_by_a_size)
    edge, cloud = prifu.split(model, "norm", draw((2, 3, 64, 64)))
    for batch in (1, 3, 5):
        (x,) = draw((batch, 3, 64, 64))
        assert difference(model(x), cloud(edge(x))) <= 1e-11


def test_a_border_map_may_lie_behind_the_cut():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1),
    ).double()  # fmt: skip
    model = prifu.wrap(net, bias=True).eval()
    unit = prifu.filters(model)["1"]
    unit.weight.data[::2] = 0.0
    unit.bias.data.normal_()
    (x,) = draw((2, 3, 8, 8))
    pruned = prifu.prune(model, x)
    edge, cloud = prifu.split(pruned, "2", x)
    for shape in ((2, 3, 8, 8), (5, 3, 9, 12)):
        (x,) = draw(shape)
        assert difference(model(x), cloud(edge(x))) <= 1e-11


def test_a_loop_over_the_batch_is_not_cut():
    def one_by_one(net, x):
        return net.last(torch.stack(list(net.next(net.features(x)).mean((2, 3)))))

    with pytest.raises(CaptureError, match="for each batch size"):
        prifu.split(Net(one_by_one).eval(), "norm", torch.zeros(2, 3, 8, 8))


def test_a_model_without_parameters_is_cut():
    net = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    x = torch.randn(2, 3, 8, 8)
    edge, cloud = prifu.split(net, "0", x)
    assert torch.equal(cloud(edge(x)), net(x))


class Shifted(nn.Module):
    """Shifts some channels by a frame, writing into a copy, on clips (N, frames, C, H, W)."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b = nn.Linear(8, 3)

    def forward(self, x):
        n, frames = x.shape[:2]
        if frames < 2:
            raise ValueError("too short")
        y = torch.relu(self.norm(self.a(x.flatten(0, 1)))).unflatten(0, (n, frames))
        moved = y.clone()
        moved[:, 1:, :2] = y[:, :-1, :2]
        return self.b(moved.mean((1, 3, 4)))


def test_clips_of_other_image_sizes_are_taken():
    torch.manual_seed(0)
    model = prifu.wrap(Shifted()).eval()
    prifu.filters(model)["norm"].weight.data[1::2] = 0.0
    small = prifu.prune(model, torch.randn(2, 4, 3, 12, 12))
    for shape in ((1, 4, 3, 9, 9), (3, 4, 3, 20, 15)):
        x = torch.randn(shape)
        assert difference(model(x), small(x)) < 1e-6
