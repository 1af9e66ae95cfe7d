"""What a pruned model does otherwise in training than the filtered one is in its report."""

import pytest
import torch
import torch.nn.functional as F
from test_prune_odd import Front
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.prune.verify import difference


def pruned(net, x):
    """Close every other channel, and prune; returns the pruned model and its notes."""
    torch.manual_seed(0)
    model = prifu.wrap(net).eval()
    for unit in prifu.filters(model).values():
        unit.weight.data[::2] = 0.0
    small = prifu.prune(model, x)
    assert difference(model(x), small(x)) < 1e-5
    return model, small, dict(prifu.report(small).notes)


class Branch(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.a, self.norm, self.o = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2)
        self.q, self.zero, self.body = nn.Linear(16, 16), nn.Linear(16, 16), body
        self.down, self.up = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.zeros(16, 4))
        self.gamma, self.gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(16))
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x):
        return self.o(self.body(self, self.norm(self.a(x))))


ZEROED = {
    "up": lambda s, h: s.q(h) + F.linear(F.linear(h, s.down), s.up),
    "zero.weight": lambda s, h: h + s.zero(s.q(h).relu()),
    "gamma": lambda s, h: h + s.gamma * s.q(h),
    "gate": lambda s, h: h + s.gate.tanh() * s.q(h),
}


@pytest.mark.parametrize("name", ZEROED)
def test_branches_that_start_at_zero_are_named(name):
    _, _, notes = pruned(Branch(ZEROED[name]), torch.randn(2, 5, 8))
    assert "cannot be trained again" in notes[name]


class Words(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.f, self.norm2, self.head = nn.Linear(8, 8), nn.LayerNorm(8), head

    def forward(self, ids):
        return self.head(self, self.norm2(self.f(self.norm(self.embedding(ids)))))


@pytest.mark.parametrize(
    "head",
    [
        lambda s, h: h @ s.embedding.weight.T,
        lambda s, h: F.linear(h, s.embedding.weight),
    ],
)
def test_a_weight_that_a_layer_shares_with_a_product_stays_shared(head):
    ids = torch.randint(0, 20, (2, 6))
    model, small, notes = pruned(Words(head), ids)
    assert any("no rule" in why for why in notes.values())
    assert sum(p.shape == (20, 8) for p in small.parameters()) == 1
    small(ids).sum().backward()
    model(ids).sum().backward()
    tied = model.embedding.weight.grad
    assert torch.allclose(small.get_submodule("embedding").weight.grad, tied, atol=1e-4)
    again = prifu.rebuild(Words(head), prifu.plan(small), small.state_dict())
    assert difference(small(ids), again(ids)) == 0


class Dilated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.d, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.norm(self.a(x))
        return self.out(self.d(x) + F.conv2d(x, self.d.weight, None, padding=2, dilation=2))


def test_a_kernel_that_is_sliced_for_its_layer_alone_is_named():
    _, _, notes = pruned(Dilated(), torch.randn(2, 3, 8, 8))
    assert "separate in the pruned model" in notes["d_weight_whole"]


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, training=False)


def test_functional_batch_norms_that_become_layers_are_named():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(), nn.ReLU(), nn.Conv2d(8, 2, 1))
    _, _, notes = pruned(net, torch.randn(2, 3, 8, 8))
    assert "BatchNorm" in notes["1.layer"]


class Computed(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.norm, self.w, self.how = nn.LayerNorm(8), nn.Parameter(torch.randn(8, 8)), how
        self.register_buffer("mask", torch.ones(8, 8).tril())

    def forward(self, x):
        return self.how(self, self.norm(x))


@pytest.mark.parametrize(
    ("how", "trained", "named"),
    [
        (lambda s, h: h @ s.w.detach(), False, False),
        (lambda s, h: F.linear(h, s.w * s.mask), True, True),
        (lambda s, h: h @ s.w.tril(), True, True),
        (lambda s, h: h @ s.w.T, True, False),
    ],
)
def test_weights_that_are_computed_from_parameters(how, trained, named):
    _, small, notes = pruned(Computed(how), torch.randn(2, 5, 8))
    (layer,) = [m for m in small.modules() if isinstance(m, nn.Linear)]
    assert layer.weight.requires_grad is trained
    assert ("training changes that freely" in str(notes)) is named


class Stores(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2)
        self.penalty = 0.0
        self.register_buffer("usage", torch.zeros(16))

    def forward(self, x):
        h = self.norm(self.a(x))
        self.usage = 0.9 * self.usage + h.detach().abs().mean(0)
        self.penalty = h.pow(2).mean()
        return self.b(h)


def test_what_a_forward_stores_is_named():
    _, _, notes = pruned(Stores(), torch.randn(2, 8))
    assert "stores 'penalty', 'usage'" in notes["Stores"]


def test_forwards_that_store_nothing_have_no_note():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 2, 1))
    assert pruned(net, torch.randn(2, 3, 8, 8))[2] == {}


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("k", torch.tensor([2.0], dtype=torch.float64))
        self.a, self.n, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)

    def forward(self, x):
        return self.b(self.n(self.a(x) * self.k.to(x.dtype)))


@pytest.mark.parametrize("make", [Mixed, Front])
def test_rebuilt_models_have_the_types_of_the_original(make):
    x = torch.randn(5, 8)
    _, small, _ = pruned(make(), x)
    again = prifu.rebuild(make(), prifu.plan(small), small.state_dict())
    assert {n: p.dtype for n, p in small.state_dict().items()} == {
        n: p.dtype for n, p in again.state_dict().items()
    }
    assert difference(small(x), again(x)) == 0


class Vectors(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.f, self.n, self.o = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        self.w, self.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.body = body
        self.one = nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        return self.body(self, self.n(self.f(x)))


VECTORS = {
    "a matrix times a vector": lambda s, b: s.w @ b[0, 0],
    "a layer on a mean": lambda s, b: s.o(b.mean((0, 1))),
    "a layer on a vector": lambda s, b: s.o(b[0, 0]),
    "a flipped vector": lambda s, b: b + b.mean((0, 1)).flip(0),
    "a vector as weight": lambda s, b: F.linear(b, s.v),
    "the largest along a computed dimension": lambda s, b: b.max(b.dim() - 1)[0],
    "a weight that is broadcast": lambda s, b: torch.einsum("blc,co->blo", b, s.one),
    "einsum without an arrow": lambda s, b: torch.einsum("blc,cd", b, s.w),
    "indices that nobody reads": lambda s, b: torch.max(b, 1).values,
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_and_computed_dimensions_are_taken(name):
    pruned(Vectors(VECTORS[name]), torch.randn(2, 5, 8))
