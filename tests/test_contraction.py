"""Products of tensors and computed kernels: exact, and no wider than what is live."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.prune.verify import difference

WIDTH, HEADS = 24, 3


class Attention(nn.Module):
    """Queries, keys and values with filters of their own, as LeViT and XCiT have them."""

    def __init__(self, mix):
        super().__init__()
        self.mix = mix
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.nq, self.nk, self.nv = (nn.BatchNorm1d(WIDTH) for _ in range(3))
        self.o = nn.Linear(WIDTH, 100)

    def heads(self, x, linear, norm):
        x = norm(linear(x).transpose(1, 2)).transpose(1, 2)
        return x.reshape(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2)

    def forward(self, x):
        q = self.heads(x, self.q, self.nq)
        k = self.heads(x, self.k, self.nk)
        v = self.heads(x, self.v, self.nv)
        y = self.mix(q, k, v)
        return self.o(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], WIDTH))


def across_channels(q, k, v):
    """Attend between channels, as XCiT does."""
    q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
    scores = (q.transpose(-2, -1) @ k) * 0.3
    return (scores.softmax(-1) @ v.transpose(-2, -1)).transpose(-2, -1)


MIXES = {
    "fused": F.scaled_dot_product_attention,
    "matmul": lambda q, k, v: F.softmax(q @ k.transpose(-2, -1), dim=-1) @ v,
    "methods": lambda q, k, v: q.matmul(k.transpose(-2, -1)).softmax(dim=-1).matmul(v),
    "not convex": lambda q, k, v: (q @ k.transpose(-2, -1)).relu() @ v,
    "a mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=(q[..., :1] - k[..., :1].transpose(-2, -1))
    ),
    "linear": lambda q, k, v: q.relu() @ (k.relu().transpose(-2, -1) @ v),
    "across channels": across_channels,
}


def closed(model, keep):
    for unit, open_channels in zip(prifu.filters(model).values(), keep, strict=True):
        mask = torch.zeros(WIDTH, dtype=torch.bool)
        mask[open_channels] = True
        unit.weight.data = torch.where(mask, 0.5 + torch.rand(WIDTH), 0.0)
        if unit.bias is not None:
            unit.bias.data.normal_()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d)):
        norm.running_mean.normal_()
        norm.bias.data.normal_()
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", MIXES)
def test_attention_is_exact_and_values_are_dropped(name, bias):
    torch.manual_seed(0)
    keep = [range(0, 24, 2), range(0, 24, 3), range(1, 24, 2)]
    model = closed(prifu.wrap(Attention(MIXES[name]), bias=bias), keep).double()
    pruned = prifu.prune(model, torch.zeros(2, 5, WIDTH))
    x = torch.randn(3, 9, WIDTH, dtype=torch.float64)
    assert difference(model(x), pruned(x)) < 1e-11
    assert pruned.get_submodule("v").out_features == 12
    # A constant stays a constant only behind weights that sum to 1; zeros always do.
    drops = not bias or name in ("fused", "matmul", "methods")
    drops = drops and name != "across channels"
    assert pruned.get_submodule("o").in_features == (12 if drops else WIDTH)
    if not bias and name not in ("a mask", "across channels"):
        # A query channel is read only where its key channel is open, and the other way round.
        both = len(set(keep[0]) & set(keep[1]))
        assert pruned.get_submodule("q").out_features == both
        assert pruned.get_submodule("k").out_features == both


class Blurred(nn.Module):
    """Two convolutions with a fixed or computed kernel between them, called as a function."""

    def __init__(self, kernel, **settings):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)
        self.settings = settings
        if isinstance(kernel, nn.Parameter):
            self.raw = kernel
        else:
            self.register_buffer("raw", kernel)
        self.shared = False

    def kernel(self):
        return self.raw

    def forward(self, x):
        y = F.conv2d(self.norm(self.first(x)), self.kernel(), **self.settings)
        return self.last(y) + (self.raw.sum() if self.shared else 0)


class Standardized(Blurred):
    def kernel(self):
        flat = self.raw.reshape(1, 8, -1)
        scaled = F.batch_norm(flat, None, None, training=True, eps=1e-6)
        return scaled.reshape_as(self.raw)


def kernels():
    torch.manual_seed(1)
    return {
        "blur": Blurred(torch.rand(8, 1, 3, 3), stride=2, groups=8),
        "a parameter": Blurred(nn.Parameter(torch.rand(8, 8, 3, 3)), padding=1),
        "grouped": Blurred(nn.Parameter(torch.rand(8, 4, 3, 3)), groups=2),
        "standardized": Standardized(nn.Parameter(torch.rand(8, 8, 3, 3))),
    }


@pytest.mark.parametrize("name", kernels())
def test_functional_convolutions_are_sliced(name):
    net = kernels()[name]
    model = prifu.wrap(net).eval()
    prifu.filters(model)["norm"].weight.data[:4] = 0.0
    pruned = prifu.prune(model, torch.zeros(2, 3, 12, 12))
    x = torch.randn(3, 3, 16, 16)
    assert difference(model(x), pruned(x)) < 1e-5
    assert pruned.get_submodule("first").out_channels == 4
    layer = pruned.get_submodule("layer")
    assert layer.weight.requires_grad == isinstance(net.raw, nn.Parameter)
    again = prifu.rebuild(kernels()[name], prifu.plan(pruned), pruned.state_dict())
    assert torch.equal(again(x), pruned(x))


def test_a_kernel_that_is_read_elsewhere_stays_what_it_is():
    net = kernels()["a parameter"]
    net.shared = True
    model = prifu.wrap(net).eval()
    prifu.filters(model)["norm"].weight.data[:4] = 0.0
    pruned = prifu.prune(model, torch.zeros(2, 3, 12, 12))
    assert dict(pruned.named_parameters())["raw"].shape == (8, 8, 3, 3)
    x = torch.randn(3, 3, 16, 16)
    assert difference(model(x), pruned(x)) < 1e-5


NORMS = {
    "group": (lambda: nn.GroupNorm(4, 16), 4),
    "instance": (lambda: nn.InstanceNorm2d(16, affine=True), 16),
    "group and activation": (lambda: timm.layers.GroupNormAct(16, num_groups=4), 4),
    "evolved": (lambda: timm.layers.EvoNorm2dS0(16, groups=4), 4),
    "filter response": (lambda: timm.layers.FilterResponseNormTlu2d(16), 16),
    "one group": (lambda: timm.layers.GroupNorm1(16), 1),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_groups_of_a_norm_that_are_closed_as_a_whole_are_dropped(name, bias):
    make, groups = NORMS[name]
    torch.manual_seed(0)
    model = prifu.wrap(nn.Sequential(nn.Conv2d(3, 16, 3), make(), nn.Conv2d(16, 5, 1)), bias=bias)
    unit = prifu.filters(model)["1"]
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.uniform_(0.2, 1.0)
        unit.weight.data = 0.1 * torch.tensor([0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0.5])
        if bias:
            unit.bias.normal_()
    model = model.double().eval()
    pruned = prifu.prune(model, torch.zeros(2, 3, 12, 12))
    x = torch.randn(3, 3, 16, 20, dtype=torch.float64)
    assert difference(model(x), pruned(x)) < 1e-11
    expected = {4: 8, 16: 5, 1: 16}[groups]
    assert pruned.get_submodule("0").out_channels == expected
    assert pruned.get_submodule("2").in_channels == 5
    again = prifu.rebuild(
        nn.Sequential(nn.Conv2d(3, 16, 3), make(), nn.Conv2d(16, 5, 1)),
        prifu.plan(pruned),
        pruned.state_dict(),
    )
    assert torch.equal(again(x), pruned(x))


class Placed(nn.Module):
    """A mask over places, so that what is known differs from place to place."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.mask = nn.Parameter((torch.arange(12) > 3).float().reshape(1, 1, 1, 12))
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)) * self.mask)


@pytest.mark.parametrize("bias", [False, True])
def test_a_kernel_that_spans_places_with_facts_of_their_own(bias):
    torch.manual_seed(0)
    model = prifu.wrap(Placed(), bias=bias).double().eval()
    unit = prifu.filters(model)["norm"]
    unit.weight.data[:4] = 0.0
    if bias:
        unit.bias.data.normal_()
    pruned = prifu.prune(model, torch.zeros(2, 3, 12, 12))
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    assert difference(model(x), pruned(x)) < 1e-11
    assert pruned.get_submodule("first").out_channels == 4
    if not bias:
        assert pruned.get_submodule("last").in_channels == 4


class Normalizing(nn.Module):
    """Batch norms as functions, with parts of its own."""

    def __init__(self, layer, affine, half=False):
        super().__init__()
        self.enter, self.out = layer(6, 8, 1), layer(8, 2, 1)
        self.mean, self.spread = nn.Buffer(torch.randn(8)), nn.Buffer(torch.rand(8) + 0.5)
        self.scale = nn.Parameter(torch.rand(8) + 0.5) if affine else None
        self.shift = nn.Parameter(torch.randn(8)) if affine and not half else None

    def forward(self, x):
        x = F.batch_norm(
            self.enter(x), self.mean, self.spread, self.scale, self.shift, self.training, 0.2, 1e-3
        )
        return self.out(x.relu())


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_functional_batch_norms_are_sliced(layer, affine):
    torch.manual_seed(0)
    model = prifu.wrap(Normalizing(layer, affine)).eval()
    next(iter(prifu.filters(model).values())).weight.data[:4] = 0.0
    size = [5, 4, 3][: {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[layer]]
    pruned = prifu.prune(model, torch.zeros(2, 6, *size))
    assert pruned.get_submodule("enter").out_channels == 4
    assert pruned.get_submodule("out").in_channels == 4
    x = torch.randn(3, 6, *size)
    torch.testing.assert_close(pruned(x), model(x))
    again = prifu.rebuild(Normalizing(layer, affine), prifu.plan(pruned), pruned.state_dict())
    assert torch.equal(again(x), pruned(x))


def test_a_functional_batch_norm_with_a_scale_alone_stays():
    torch.manual_seed(0)
    model = prifu.wrap(Normalizing(nn.Conv1d, True, half=True)).eval()
    next(iter(prifu.filters(model).values())).weight.data[:4] = 0.0
    pruned = prifu.prune(model, torch.zeros(2, 6, 5))
    assert pruned.get_submodule("enter").out_channels == 8
    x = torch.randn(3, 6, 5)
    torch.testing.assert_close(pruned(x), model(x))
