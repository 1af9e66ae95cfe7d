"""Odd forwards: each is pruned exactly, or refused with a word that helps; never wrong."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

import prifu_plugin as prifu
from prifu_plugin.errors import CaptureError, VerificationError
from prifu_plugin.prune.verify import difference, is_rounded


class Odd(nn.Module):
    """Two filtered branches a and b of 8 channels, and a body that does something odd with them."""

    def __init__(self, body, width):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.n2 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.t = nn.Conv2d(width, 4, 3, padding=1)
        self.body = body

    def forward(self, x):
        return self.body(self.t, x, self.n1(self.c1(x)), self.n2(self.c2(x)))


def read_twice(t, x, a, b):
    c = b + 1
    b.relu_()
    return t(c * b)


def assignment(t, x, a, b):
    b[:, 0] = 1.0
    b[:, 3:5] += a[:, :2]
    return t(b)


def update_of_a_slice(t, x, a, b):
    part = b[:, :4]
    part += 1
    return t(b)


def filled(t, x, a, b):
    ones, some = torch.ones_like(b), torch.empty_like(a).zero_()
    some.fill_(0.5)
    return t(b * ones + some * a + torch.full_like(a, 3.0)), torch.zeros_like(b) + a


EXACT = {
    "filled": filled,
    "filled alone": lambda t, x, a, b: t(torch.ones_like(a)) + b.mean(),
    "filled by a size": lambda t, x, a, b: t(b + torch.full_like(a, x.shape[-1])),
    "filled, then joined": (lambda t, x, a, b: t(torch.cat([a, torch.ones_like(b)], 1)), 16),
    "assignment": assignment,
    "update of a slice": update_of_a_slice,
    "operand read before and after": read_twice,
    "functional in place": lambda t, x, a, b: t(F.leaky_relu_(b) + b),
    "in place, chained": lambda t, x, a, b: t(b.mul_(a).add_(b)),
    "cat of one tensor twice": (lambda t, x, a, b: t(torch.cat([b, b], 1)), 16),
    "cat by axis": (lambda t, x, a, b: t(torch.cat([a, b], axis=1)), 16),
    "cat along a computed dimension": (lambda t, x, a, b: t(torch.cat([a, b], a.dim() - 3)), 16),
    "cat of chunks": lambda t, x, a, b: t(torch.cat(b.chunk(2, 1)[::-1], 1)),
    "cat of chunks of a view": lambda t, x, a, b: t(
        torch.cat(b.flatten(2).chunk(2, 1), 1).unflatten(2, x.shape[2:])
    ),
    "cat of a split over what was channels": lambda t, x, a, b: torch.cat(
        torch.split((b.flatten(0, 1)[:, None] * 2.0).squeeze(1), 1, 1), 2
    ),
    "cat of spatial chunks": lambda t, x, a, b: t(torch.cat(b.chunk(2, 3), 2)),
    "stack of unbound": lambda t, x, a, b: t(torch.stack(b.unbind(1), 1)),
    "stack": lambda t, x, a, b: t(torch.stack([a, b]).sum(0)),
    "keyword arguments": lambda t, x, a, b: torch.permute(input=b, dims=(0, 2, 3, 1)),
    "pad with a value": (lambda t, x, a, b: t(F.pad(b, (0, 0, 0, 0, 2, 2), value=1.0)), 12),
    "sum over channels": lambda t, x, a, b: t(a * b.sum(1, keepdim=True)),
    "mean over a computed dimension": lambda t, x, a, b: b.mean(b.dim() - 1),
    "softmax over channels": lambda t, x, a, b: t(b.softmax(1)),
    "matrix product": lambda t, x, a, b: a.flatten(2) @ b.flatten(2).transpose(1, 2),
    "broadcast of a gate": lambda t, x, a, b: t(a.mean((2, 3), keepdim=True) + b),
    "scaled sum": lambda t, x, a, b: t(torch.add(a, b, alpha=0.5)),
    "size in a formula": lambda t, x, a, b: t(b / (b.shape[1] * b.shape[2]) ** 0.5),
    "numel": lambda t, x, a, b: b.sum() / b.numel() + b.sum((1, 2, 3)) / b.shape[1:].numel(),
    "scalar tensors": lambda t, x, a, b: torch.cat([a.sum()[None], b.sum().unsqueeze(0)]),
    "dtype of another tensor": lambda t, x, a, b: b.mean((2, 3)).to(x),
    "two comparisons": lambda t, x, a, b: t(a * ((b > 0) & (b < 1) | (a > 2))),
    "comparison": lambda t, x, a, b: t(a * (b > 0)),
    "where": lambda t, x, a, b: t(torch.where(b > 0, a, 0.0)),
    "integers out": lambda t, x, a, b: (t(b).argmax(1), t(b) > 0, b.size(1), b.stride()),
    "dict out": lambda t, x, a, b: {"a": a, "t": t(b), "none": None, "x": x},
    "parameter out": lambda t, x, a, b: (t(b), b.mean()),
    "difference of equals": lambda t, x, a, b: t(b - b) + 1,
    "repeat": (lambda t, x, a, b: t(b.repeat(1, 2, 1, 1)), 16),
    "flip and roll": lambda t, x, a, b: t(b.flip(1).roll(3, 1)),
    "interpolate": lambda t, x, a, b: t(F.interpolate(b, scale_factor=2, mode="bilinear")),
    "pixel shuffle": (lambda t, x, a, b: t(F.pixel_shuffle(b, 2)), 2),
    "unfold": (lambda t, x, a, b: t(F.unfold(b, 3, padding=1).unflatten(2, x.shape[2:])), 72),
    "max pooling of a border": lambda t, x, a, b: t(
        F.max_pool2d(F.pad(b, (1, 0, 0, 2), value=-torch.inf), 3, 1)
    ),
    "max pooling beyond a border": lambda t, x, a, b: torch.nan_to_num(
        F.max_pool2d(F.pad(b, (0, 4, 4, 0), value=-torch.inf), 3, 1), neginf=-9.0
    ),
    "pool with a divisor": lambda t, x, a, b: t(F.avg_pool2d(b, 2, divisor_override=3)),
    "einsum": lambda t, x, a, b: torch.einsum("nchw,ndhw->ncd", a, b),
}  # fmt: skip


@pytest.mark.parametrize("dead", [(), ("n1",), ("n2",), ("n1", "n2")])
@pytest.mark.parametrize("name", EXACT)
def test_exact(name, dead):
    body, width = EXACT[name] if isinstance(EXACT[name], tuple) else (EXACT[name], 8)
    for seed, bias in ((0, False), (1, True))[len(dead) % 2 :]:  # some closed: in one way only
        torch.manual_seed(seed)
        model = prifu.wrap(Odd(body, width), bias=bias).double().eval()
        for path, unit in prifu.filters(model).items():
            unit.weight.data[torch.rand(8) < 0.5] = 0.0
            if path in dead:
                unit.weight.data.zero_()
            if bias:
                unit.bias.data.normal_()
        pruned = prifu.prune(model, torch.zeros(2, 3, 8, 12))
        for shape in ((1, 3, 8, 12), (3, 3, 14, 10)):
            x = torch.randn(shape, dtype=torch.float64)
            found, expected = pruned(x.clone()), model(x.clone())
            assert pytree.tree_structure(found) == pytree.tree_structure(expected)
            assert difference(expected, found) <= 1e-11


def into_a_view(t, x, a, b):
    b.view(b.size(0), -1).relu_()
    return t(b)


def overwritten(t, x, a, b):
    b.copy_(a)
    return t(b)


def into_out(t, x, a, b):
    torch.add(a, b, out=b)
    return t(b)


@pytest.mark.parametrize("body", [into_a_view, overwritten, into_out])
def test_refused(body):
    model = prifu.wrap(Odd(body, 8))
    with pytest.raises(CaptureError):
        prifu.prune(model, torch.zeros(2, 3, 8, 12))


def test_a_layers_own_weight_as_output():
    class Net(Odd):
        def forward(self, x):
            return super().forward(x), self.c1.weight

    model = prifu.wrap(Net(lambda t, x, a, b: t(a), 8))
    prifu.filters(model)["n1"].weight.data[:6] = 0.0
    pruned = prifu.prune(model, torch.zeros(2, 3, 8, 12))
    assert pruned(torch.zeros(2, 3, 8, 12))[1].shape == (8, 3, 3, 3)
    assert pruned.get_submodule("c1").out_channels == 2


def test_difference_knows_what_is_no_evidence():
    one = torch.ones(2)
    assert difference(one, one * 1.5) == 0.5
    assert difference((one, 3), (one, 4)) == float("inf")
    assert difference(one, torch.ones(3)) == float("inf")
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    assert difference(one > 0, one > 0) == 0
    assert difference(one * torch.nan, one * torch.nan) != 0
    assert difference(torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.inf])) == 0
    assert difference(torch.tensor([1.0, torch.inf]), torch.tensor([1.0, -torch.inf])) > 1
    assert operator.eq(difference([], []), 0.0)


class Centred(nn.Module):
    """A normalization without parameters, whose filter is a product behind it."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = Centred(8), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(self.norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_filter_inside_a_leaf_has_the_type_of_the_model_and_stays_frozen(dtype):
    prifu.register_norm(Centred, dim=1)
    prifu.register_leaf(Opaque)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Opaque(), nn.Conv2d(8, 2, 1)).to(dtype)
    model = prifu.wrap(net).eval()
    next(iter(prifu.filters(model).values())).weight.requires_grad_(False)
    pruned = prifu.prune(model, torch.randn(2, 3, 8, 8, dtype=dtype))
    scale = pruned.get_parameter("1.norm.scale")
    assert (scale.dtype, scale.requires_grad) == (dtype, False)


def test_a_norm_inside_a_leaf_under_two_names_loses_its_filter_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.second(self.first(x))

    prifu.register_leaf(Twice)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Twice(), nn.Conv2d(8, 2, 1))
    pruned = prifu.prune(prifu.wrap(net).eval(), torch.randn(2, 3, 8, 8))
    assert pruned.get_submodule("1.first") is pruned.get_submodule("1.second")
    assert not any(isinstance(part, prifu.PriFU) for part in pruned.modules())


class Stages(nn.Module):
    """Returns what every stage gives, as feature extractors do."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Sigmoid())

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        return {"stages": [a, b], "pooled": b.mean((2, 3))}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("closed", [8, 16])
def test_constant_channels_of_outputs_are_not_computed(bias, closed):
    torch.manual_seed(0)
    model = prifu.wrap(Stages(), bias=bias).eval()
    for unit in prifu.filters(model).values():
        unit.weight.data[:closed] = 0.0
        if bias:
            nn.init.normal_(unit.bias)
    small = prifu.prune(model, torch.zeros(2, 3, 16, 16))
    x = torch.randn(5, 3, 20, 12)
    assert difference(model(x), small(x)) < 1e-6
    before, after = prifu.report(small).macs
    assert before == 256 * 9 * (3 * 16 + 16 * 16)
    left = max(16 - closed, 1)  # one channel for the shape, if none varies
    assert after <= 256 * 9 * (3 * left + left * left) * 1.01
    aside = prifu.prune(model, torch.zeros(2, 3, 16, 16), move_cost=float("inf"))
    assert difference(model(x), aside(x)) < 1e-6
    assert "index_select" not in aside.code


class Front(nn.Module):
    """Computes its first layers in fp64, the rest in fp32."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16)).double()
        self.b = nn.Linear(16, 2)

    def forward(self, x):
        return self.b(self.a(x.double()).float())


def test_a_front_in_fp64_and_a_head_in_fp32():
    model = prifu.wrap(Front()).eval()
    prifu.filters(model)["a.1"].weight.data[::2] = 0.0
    small = prifu.prune(model, torch.randn(2, 8))
    x = torch.randn(5, 8)
    assert difference(model(x), small(x)) < 1e-6
    assert {check.dtype for check in prifu.report(small).checks} == {"float64", "float32"}


class Messages(nn.Module):
    """Sums what neighbours send along edges, which point at nodes."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x, edges):
        h = self.a(x)
        sent = torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])
        return self.b(F.relu(self.norm(sent)))


def test_a_graph_of_other_sizes_is_taken_where_indices_point_at_what_was_shown():
    model = prifu.wrap(Messages()).eval()
    prifu.filters(model)["norm"].weight.data[::2] = 0.0
    small = prifu.prune(model, (torch.randn(7, 8), torch.randint(0, 7, (2, 11))))
    for nodes, edges in ((7, 30), (8, 11), (20, 50)):
        given = torch.randn(nodes, 8), torch.randint(0, nodes, (2, edges))
        assert difference(model(*given), small(*given)) < 1e-6


def test_the_work_of_recurrent_layers_is_counted():
    class Speech(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.r = nn.LayerNorm(32), nn.LSTM(32, 16, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.r(self.norm(x))[0][:, -1])

    small = prifu.prune(prifu.wrap(Speech()).eval(), torch.randn(2, 10, 32))
    assert prifu.report(small).macs[0] == 10 * 4 * 16 * (32 + 16) + 16 * 3


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.a, self.norm = nn.Conv1d(4, 16, 1), nn.BatchNorm1d(16)
        self.b, self.gate = nn.Conv1d(8, 3, 1), gate

    def forward(self, x):
        return self.b(self.gate(self.norm(self.a(x))))


GATES = {
    "module": lambda: nn.GLU(1),
    "function": lambda: Called(lambda x: F.glu(x, 1)),
    "named": lambda: Called(lambda x: F.glu(input=x, dim=-2)),
    "module, named": lambda: Named(nn.GLU(1)),
}


class Named(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, x):
        return self.gate(input=x)


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("kind", GATES)
def test_gated_linear_units_are_looked_into(kind):
    torch.manual_seed(0)
    model = prifu.wrap(Gated(GATES[kind]())).eval()
    prifu.filters(model)["norm"].weight.data[:4] = 0.0  # what is multiplied, of half of the gates
    small = prifu.prune(model, torch.zeros(2, 4, 6))
    x = torch.randn(5, 4, 9)
    assert difference(model(x), small(x)) < 1e-6
    assert small.get_submodule("a").out_channels == 8
    assert small.get_submodule("b").in_channels == 4


class Attending(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.norm, self.read = nn.LayerNorm(16), read
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.read(self.attend, self.norm(x))


def unpacked(attend, h):
    out, _ = attend(h, h, h)
    return out


READS = {
    "first item": lambda attend, h: attend(h, h, h)[0],
    "unpacked": unpacked,
    "average asked": lambda attend, h: attend(h, h, h, average_attn_weights=True)[0],
}


@pytest.mark.parametrize("how", READS)
def test_attention_whose_weights_nobody_reads_is_taken_apart(how):
    torch.manual_seed(0)
    model = prifu.wrap(Attending(READS[how])).eval()
    prifu.filters(model)["norm"].weight.data[:8] = 0.0
    small = prifu.prune(model, torch.zeros(2, 5, 16))
    x = torch.randn(3, 7, 16)
    assert difference(model(x), small(x)) < 1e-6
    assert prifu.report(small).macs[1] < prifu.report(small).macs[0]


@pytest.mark.parametrize("read", [
    lambda attend, h: attend(h, h, h)[1],
    lambda attend, h: attend(h, h, h),
], ids=["weights alone", "both, as one"])  # fmt: skip
def test_attention_whose_weights_are_read_stays(read):
    model, x = prifu.wrap(Attending(read)).eval(), torch.randn(3, 7, 16)
    prifu.filters(model)["norm"].weight.data[:8] = 0.0
    assert difference(model(x), prifu.prune(model, x)(x)) < 1e-6


class Typed(nn.Module):
    """Returns a map in a type of its own, some of whose channels are constant."""

    def __init__(self, dtype):
        super().__init__()
        self.a, self.norm, self.dtype = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), dtype

    def forward(self, x):
        return self.norm(self.a(x)).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_outputs_keep_their_type(dtype):
    torch.manual_seed(0)
    model, x = prifu.wrap(Typed(dtype), bias=True).eval(), torch.randn(3, 3, 9, 9)
    unit = prifu.filters(model)["norm"]
    unit.weight.data[::2] = 0.0
    nn.init.normal_(unit.bias)
    small = prifu.prune(model, x)
    assert small(x).dtype == dtype
    assert difference(model(x), small(x)) < (1e-2 if dtype.itemsize == 2 else 1e-6)
    assert small.get_submodule("a").out_channels == 4


def test_outputs_keep_their_type_under_autocast():
    torch.manual_seed(0)
    x = torch.randn(3, 3, 9, 9)
    stages = prifu.wrap(Stages(), bias=True).eval()
    for one in prifu.filters(stages).values():
        one.weight.data[::2] = 0.0
        nn.init.normal_(one.bias)
    small = prifu.prune(stages, torch.zeros(2, 3, 16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(pytree.tree_leaves(stages(x)), pytree.tree_leaves(small(x)), strict=True):
            assert a.dtype == b.dtype


class Sensitive(nn.Module):
    """Computes from digits of its features that fp32 hardly has."""

    def __init__(self, cast):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)
        self.cast = cast

    def forward(self, x):
        return torch.sin(2e4 * self.cast(self.last(self.norm(self.first(x)))))


def sensitive(cast):
    torch.manual_seed(0)
    model = prifu.wrap(Sensitive(cast), bias=True).eval()
    unit = prifu.filters(model)["norm"]
    unit.weight.data[::2] = 0.0
    nn.init.normal_(unit.bias)  # is added in another order
    return model


def test_a_model_that_rounding_changes_is_compared_by_its_weights():
    model = sensitive(lambda y: y)
    pruned = prifu.prune(model, torch.randn(2, 3, 9, 9))
    report = prifu.report(pruned)
    assert {check.dtype for check in report.checks} == {"float64"}
    assert "rounding to float32 alone moves its outputs" in str(report)
    assert pruned.get_submodule("first").out_channels == 4
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64)  # and it is the same function
    assert difference(model.double()(x), pruned.double()(x)) < 0.1


def test_a_model_that_rounding_changes_and_that_casts_is_refused_with_what_to_do():
    model = sensitive(lambda y: y.float())
    with pytest.raises(VerificationError, match=r"from itself in fp64, where both agree.*double"):
        prifu.prune(model, torch.randn(2, 3, 9, 9))


def test_weights_that_are_not_those_of_the_twin_are_seen():
    def graph(dtype, *shift):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *shift)
        torch.manual_seed(0)
        for value in net.parameters():
            nn.init.normal_(value)
        return fx.symbolic_trace(net.eval().to(dtype))

    twin = graph(torch.float64)
    assert is_rounded(graph(torch.float32), twin)
    for name, value in twin.state_dict().items():
        other = graph(torch.float32)
        other.state_dict()[name].view(-1)[-1:].add_(2 if value.dtype == torch.int64 else 1e-3)
        assert not is_rounded(other, twin)
    assert not is_rounded(graph(torch.float32, nn.ReLU()), twin)
