"""A pruned model is read again by torch.load, and leaves nothing behind in torch.fx."""

import io
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import _symbolic_trace

import prifu_plugin as prifu
from prifu_plugin.prune.loadable import make_loadable
from prifu_plugin.prune.verify import difference


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.register_buffer("mask", torch.tril(torch.ones(64, 64)), persistent=False)

    def features(self, x):
        return self.norm(self.a(x))


class States(Base):
    """Makes zeros of sizes, as recurrent layers of convolutions do."""

    def forward(self, x):
        return self.b(self.features(x) + torch.zeros(x.size(0), x.size(1), 16))


class Causal(Base):
    """Makes its mask of the sequence's length."""

    def forward(self, x):
        h, length = self.features(x), x.size(1)
        mask = torch.ones((length, length), dtype=torch.bool).tril()
        return self.b(F.scaled_dot_product_attention(h, h, h, attn_mask=mask))


class Filled(Base):
    def forward(self, x):
        h = self.features(x)
        return self.b(h * torch.full(size=(x.size(0), 1, 1), fill_value=2.0, device=x.device))


class Named(Base):
    """Takes two results apart, and decides on a size."""

    def forward(self, x):
        h = self.features(x)
        values, _ = torch.topk(h, 2, dim=-1)
        if h.reshape(-1, 16).shape[0] == 0:
            return h
        return self.b(h) * values.sum(-1, keepdim=True)


class Buffer(Base):
    """Cuts its mask to the sequence's length: a stored tensor takes no proxies as bounds."""

    def forward(self, x):
        h, length = self.features(x), x.size(1)
        weights = (h @ h.transpose(1, 2)).masked_fill(self.mask[:length, :length] == 0, -1e9)
        return self.b(weights.softmax(-1) @ h)


def pruned(cls, x):
    torch.manual_seed(0)
    model = prifu.wrap(cls()).eval()
    prifu.filters(model)["norm"].weight.data[::2] = 0.0
    return model, prifu.prune(model, x)


def test_what_is_saved_whole_is_loaded_where_this_package_is_not(tmp_path):
    for cls in (States, Causal, Filled, Named):
        model, small = pruned(cls, torch.randn(2, 5, 8))
        assert not any("torch.load" in why for _, why in prifu.report(small).notes)
        longer = torch.randn(3, 7, 8)
        assert difference(model(longer), small(longer)) < 1e-6
        torch.save(small, tmp_path / f"{cls.__name__}.pt")
        torch.save((longer, small(longer)), tmp_path / f"{cls.__name__}.expected")
    code = (
        "import pathlib, sys; sys.modules['prifu_plugin'] = None\n"
        "import torch\n"
        f"files = list(pathlib.Path({str(tmp_path)!r}).glob('*.pt'))\n"
        "for file in files:\n"
        "    model = torch.load(file, weights_only=False)\n"
        "    x, y = torch.load(file.with_suffix('.expected'))\n"
        "    assert torch.equal(model(x), y), file\n"
        "print(len(files))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4\n"


def test_what_could_not_be_loaded_is_named():
    model, small = pruned(Buffer, torch.randn(2, 5, 8))
    (note,) = prifu.report(small).notes
    assert "torch.load cannot read" in note[1]
    assert "rebuild, or export" in note[1]
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    with pytest.raises(TypeError):
        torch.load(file, weights_only=False)
    x = torch.randn(2, 5, 8)
    assert difference(model(x), small(x)) < 1e-6


def test_pruning_leaves_nothing_in_torch_fx():
    class Neighbours(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.o = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

        def forward(self, x, edges):
            x = self.norm(self.a(x))
            sent = x[edges[0]]
            total = torch.zeros(x.size(0), x.size(1), dtype=x.dtype)
            to = edges[1][:, None].expand_as(sent)
            return self.o(total.scatter_reduce(0, to, sent, reduce="mean", include_self=False))

    before = set(_symbolic_trace._wrapped_fns_to_patch)
    model = prifu.wrap(Neighbours()).eval()
    prifu.filters(model)["norm"].weight.data[::2] = 0.0
    prifu.prune(model, (torch.randn(7, 8), torch.randint(0, 7, (2, 11))))
    names = {name for _, name in set(_symbolic_trace._wrapped_fns_to_patch) - before}
    assert not any("." in name for name in names)
    fx.symbolic_trace(nn.Linear(1, 1))


class Typed(Base):
    """Makes whole numbers, truths and numbers of no given type, beside whole numbers."""

    def forward(self, x, ids):
        n, length = ids.size(0), ids.size(1)
        whole = torch.full((n, length), 2)
        truth = torch.full((n, length), True)
        zeros = torch.zeros(n, length, dtype=None)
        return self.b(self.features(x)), whole // 3, ~truth, zeros


def test_what_is_made_keeps_its_type():
    model = prifu.wrap(Typed()).eval()
    prifu.filters(model)["norm"].weight.data[::2] = 0.0
    given = torch.randn(2, 5, 8), torch.randint(0, 9, (2, 5))
    small = prifu.prune(model, given)
    for a, b in zip(model(*given), small(*given), strict=True):
        assert a.dtype == b.dtype
        assert difference(a, b) < 1e-6


def test_a_shape_that_is_computed_is_passed_on():
    graph = fx.Graph()
    x = graph.placeholder("x")
    shape = graph.call_function(torch.broadcast_shapes, (graph.call_method("size", (x,)), (1, 3)))
    whole = graph.call_function(torch.zeros, (shape,))
    line = graph.call_function(torch.ones, (graph.call_method("size", (x, 0)),))
    graph.output((whole, line))
    make_loadable(graph)
    whole, line = fx.GraphModule(nn.Module(), graph)(torch.zeros(2, 1))
    assert (whole.shape, line.shape) == ((2, 3), (2,))
    assert "torch.zeros" not in graph.python_code("self").src


def test_makers_without_a_tensor_to_ask_or_of_other_kinds_stay():
    graph = fx.Graph()
    x, n = graph.placeholder("x"), graph.placeholder("n")
    size = graph.call_method("size", (x, 0))
    made = graph.call_function(torch.zeros, (size, 3))
    plain = graph.call_function(torch.zeros, (2, 3))
    asked = graph.call_function(torch.ones, (n,))
    pinned = graph.call_function(torch.empty, (size,), {"pin_memory": False})
    graph.output((made, plain, asked, pinned))
    make_loadable(graph)
    graph.lint()
    targets = [node.target for node in graph.nodes]
    assert targets.count("new_zeros") == 1
    assert [torch.zeros, torch.ones, torch.empty] == [t for t in targets if callable(t)]
