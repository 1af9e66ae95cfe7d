import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import prifu_plugin as prifu
from prifu_plugin.errors import CaptureError
from prifu_plugin.prune.lower import lower

X = torch.randn(5, 4)


def runs_alike(net, x):
    """Lowering must not change what a network computes."""
    net = net.double().eval()
    x = x.double()
    expected = net(x.clone())
    captured = lower(net)
    found = fx.GraphModule(captured.root, captured.graph)(x.clone())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    return captured.graph


class Inplace(nn.Module):
    """In-place operations whose operand is read before and afterwards."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = x * 2
        before = y + 1
        self.act(y)
        z = y - 1
        z += before
        z.clamp_(max=3.0)
        F.relu(z, inplace=True)
        return z + y, before


def test_inplace_operations_become_pure():
    graph = runs_alike(Inplace(), torch.randn(3, 4))
    targets = {str(node.target) for node in graph.nodes if node.op == "call_method"}
    assert "clamp_" not in targets
    assert not any(node.kwargs.get("inplace") for node in graph.nodes)


class Block(nn.Module):
    """A transformer block of nn.MultiheadAttention, as torchvision's ViT has it."""

    def __init__(self, **settings):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return self.out(x + y)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_taken_apart_and_sliced(bias):
    torch.manual_seed(0)
    net = Block(bias=bias)
    graph = runs_alike(net, torch.randn(2, 5, 8))
    assert not any(str(node.target) == "attention" for node in graph.nodes)
    model = prifu.wrap(net.float(), bias=bias).eval()
    prifu.filters(model)["norm"].weight.data[:5] = 0.0
    if bias:
        prifu.filters(model)["norm"].bias.data.normal_()
    pruned = prifu.prune(model, torch.zeros(1, 5, 8))
    assert dict(pruned.named_parameters())["attention.in_proj_weight"].shape == (24, 3)
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(pruned(x), model(x))


def test_attention_with_weights_is_left_alone():
    class Weighted(Block):
        def forward(self, x):
            y, weights = self.attention(x, x, x)
            return self.out(self.norm(y)), weights

    graph = runs_alike(Weighted(), torch.randn(2, 5, 8))
    assert any(str(node.target) == "attention" for node in graph.nodes)


def test_a_network_that_branches_on_values_is_refused():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="Branch cannot be traced"):
        prifu.prune(prifu.wrap(Branch()), torch.randn(2, 4))
    assert [site.reached for site in prifu.sites(Branch())] == ["slot"]


class InPlace(nn.Module):
    """Writes in place into what may be the memory of something that is read afterwards."""

    def __init__(self, view):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.nothing, self.drop, self.off = nn.Identity(), nn.Dropout(0.1), nn.Dropout(0.0)
        self.view = view

    def forward(self, x):
        x = self.n(self.a(x))
        self.view(self, x).relu_()
        return self.b(x)


@pytest.mark.parametrize("name", ["nothing", "off"])
def test_what_returns_what_it_is_given_is_followed(name):
    torch.manual_seed(0)
    wrapped, x = prifu.wrap(InPlace(lambda self, x: getattr(self, name)(x))).eval(), X
    prifu.filters(wrapped)["n"].weight.data[:2] = 0.0
    torch.testing.assert_close(prifu.prune(wrapped, x)(x), wrapped(x))
    edge, cloud = prifu.split(wrapped, "a", x)
    assert torch.equal(cloud(edge(x)), wrapped(x))


@pytest.mark.parametrize(
    "view",
    [
        lambda self, x: self.drop(x),
        lambda self, x: nn.functional.dropout(x, 0.1, False),
        lambda self, x: x.float(),
        lambda self, x: x.to(torch.float32),
        lambda self, x: x.ravel(),
        lambda self, x: x.mT,
    ],
)
def test_what_may_be_the_same_memory_is_refused(view):
    with pytest.raises(CaptureError, match="shares memory"):
        prifu.prune(prifu.wrap(InPlace(view)).eval(), X)


def test_a_cast_to_another_type_is_a_copy():
    torch.manual_seed(0)
    wrapped = prifu.wrap(InPlace(lambda self, x: x.half())).eval()
    torch.testing.assert_close(prifu.prune(wrapped, X)(X), wrapped(X))


def test_dropout_in_place_is_its_own_result():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Hardswish(inplace=True)]
    net = nn.Sequential(*layers, nn.Dropout(0.2, inplace=True), nn.Linear(4, 2))
    pruned = prifu.prune(prifu.wrap(net).eval(), X)
    assert isinstance(pruned, fx.GraphModule)
    torch.testing.assert_close(pruned(X), net.eval()(X))
