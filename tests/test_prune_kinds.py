"""Kinds of layers, inputs, types and names that a rewrite must get right."""

import collections
import dataclasses
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as masking

import prifu_plugin as prifu
from prifu_plugin.errors import CaptureError, ConfigError, VerificationError
from prifu_plugin.prune import one_graph
from prifu_plugin.prune.verify import difference


class Net(nn.Module):
    """Layers of width 8 with a body, on (N, L, 8)."""

    def __init__(self, body=None, **members):
        super().__init__()
        self.f, self.n0, self.n, self.o = (
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.LayerNorm(8),
            nn.Linear(8, 4),
        )
        for name, member in members.items():
            setattr(self, name, member)
        self.body = body

    def forward(self, x):
        return self.body(self, x, self.n(self.f(self.n0(x))))


def half_off(model, seed=0):
    torch.manual_seed(seed)
    for unit in prifu.filters(model).values():
        unit.weight.data[torch.rand(len(unit.weight)) < 0.5] = 0.0
        if unit.bias is not None:
            unit.bias.data.normal_()
    return model.eval()


def check(net, *shapes, fresh=None):
    """Prune exactly, leave no filter, and rebuild from a plan if there is a fresh net."""
    for bias in (False, True):
        model = half_off(prifu.wrap(net.double(), bias=bias))
        pruned = prifu.prune(model, tuple(torch.zeros(shape) for shape in shapes))
        x = [torch.randn(5, *shape[1:], dtype=torch.float64) for shape in shapes]
        assert difference(model(*x), pruned(*x)) <= 1e-11
        assert not [m for m in pruned.modules() if isinstance(m, prifu.PriFU)]
        if fresh is not None:
            again = prifu.rebuild(fresh(), prifu.plan(pruned), pruned.state_dict())
            assert difference(pruned(*x), again(*x)) == 0


def weights(*shape):
    return nn.Parameter(torch.randn(shape))


BODIES = {
    "cross attention": lambda: Net(
        lambda s, x, h: s.o(s.at(s.n0(x), h, h, need_weights=False)[0]),
        at=nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "lstm": lambda: Net(
        lambda s, x, h: s.o(s.r(h)[0] + s.r(h)[1][0][-1][:, None]),
        r=nn.LSTM(8, 8, batch_first=True),
    ),
    "tied, as it is": lambda: Net(
        lambda s, x, h: F.linear(h, s.f.weight) + F.linear(x, s.f.weight)
    ),
    "tied, transposed": lambda: Net(lambda s, x, h: F.linear(h, s.f.weight.t())),
    "one matrix twice": lambda: Net(
        lambda s, x, h: F.linear(F.linear(h, s.w), s.w), w=weights(8, 8)
    ),
    "names that are taken": lambda: Net(
        lambda s, x, h: s.constants(F.linear(h * s.n_scale, s.w2) + s.w2_bias) + s.f_weight_whole,
        constants=nn.Linear(4, 4),
        n_scale=weights(8),
        w2=weights(4, 8),
        w2_bias=weights(4),
        f_weight_whole=weights(4),
    ),
    "rms norm with a bias, names taken": lambda: Net(
        lambda s, x, h: s.o(s.n1(h) * s.n1_scale + s.n1_shift),
        n1=nn.RMSNorm(8),
        n1_scale=weights(8),
        n1_shift=weights(8),
    ),
    "a normalized parameter": lambda: Net(
        lambda s, x, h: s.o(h + s.n(s.token)), token=weights(1, 1, 8)
    ),
    "parameters of a norm read elsewhere": lambda: Net(
        lambda s, x, h: h * s.n.weight + s.n.bias * s.o.bias.sum()
    ),
    "float inside": lambda: Net(
        lambda s, x, h: s.o((h @ h.transpose(1, 2)).float().softmax(-1).to(h.dtype) @ h)
    ),
    "optional argument inside": lambda: Net(lambda s, x, h: s.o(s.inner(h)), inner=Optional()),
}


class Optional(nn.Module):
    def forward(self, x, mask=None, scale=2.0):
        return x * scale if mask is None else x * mask


SLICED = {
    "bias computed": lambda: Net(
        lambda s, x, h: F.linear(h, weight=s.w, bias=torch.cat((s.b, torch.zeros_like(s.b)))),
        w=weights(4, 8),
        b=weights(2),
    ),
    "weight computed": lambda: Net(
        lambda s, x, h: F.linear(h, F.normalize(s.w, dim=1), s.b), w=weights(4, 8), b=weights(4)
    ),
    "all by name": lambda: Net(
        lambda s, x, h: F.linear(bias=s.b, input=h, weight=s.w), w=weights(4, 8), b=weights(4)
    ),
}
"""Forwards whose last linear map is a function; it reads open channels only."""


@pytest.mark.parametrize("name", SLICED)
def test_functional_linear_maps_are_sliced(name):
    torch.manual_seed(0)
    model = half_off(prifu.wrap(SLICED[name]().double()))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    pruned = prifu.prune(model, x)
    assert difference(model(x), pruned(x)) <= 1e-11
    assert "no rule" not in str(prifu.report(pruned).notes)
    left = int(prifu.filters(model)["n"].open.sum())
    assert {p.shape[1] for p in pruned.parameters() if p.shape[0] == 4 and p.ndim == 2} == {left}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name):
    def fresh():
        torch.manual_seed(1)
        return BODIES[name]()

    torch.manual_seed(0)
    check(BODIES[name](), (2, 5, 8), fresh=fresh)


def parametrized(kind):
    conv = nn.Conv2d(3, 8, 3)
    kind(conv)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize(
    "kind",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        lambda conv: masking.l1_unstructured(conv, "weight", 0.3),
    ],
)
def test_computed_weights(kind):
    torch.manual_seed(0)
    net = parametrized(kind)
    check(net, (2, 3, 8, 8), fresh=lambda: parametrized(kind))
    check(net, (2, 3, 8, 8))  # the first prune left the model as it was


def test_a_masked_norm_is_filtered():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    masking.l1_unstructured(net[1], "weight", 0.3)
    model = half_off(prifu.wrap(net))
    closed = prifu.filters(model)["1"].closed
    assert closed.any()
    assert not model(torch.randn(2, 3, 8, 8))[:, closed].any()
    check(net, (2, 3, 8, 8))


def test_hooks_of_the_model_itself_are_named_and_left_out():
    model = half_off(prifu.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    seen = []
    model.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    x = torch.randn(2, 3, 8, 8)
    pruned = prifu.prune(model, x)
    note = "its forward hooks are not in the pruned model"
    assert ("the model", note) in prifu.report(pruned).notes
    seen.clear()
    pruned(x)
    assert not seen


def test_hooks_are_named():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    net[2].register_forward_hook(lambda m, i, o: None)
    pruned = prifu.prune(prifu.wrap(net), torch.zeros(1, 3, 8, 8))
    assert any("hooks" in reason for _, reason in prifu.report(pruned).notes)
    net[2].register_forward_hook(lambda m, i, o: o + 1)
    with pytest.raises(VerificationError):
        prifu.prune(prifu.wrap(net), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_half_precision(dtype, affine):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=affine), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    model = half_off(prifu.wrap(nn.Sequential(*layers, nn.GroupNorm(2, 8)), bias=True))
    x = torch.randn(2, 3, 12, 12)
    expected = model(x)
    model = model.to(dtype)
    pruned = prifu.prune(model, x)
    assert pruned(x.to(dtype)).dtype == dtype
    assert difference(expected, pruned(x.to(dtype))) < 0.05


def test_frozen_stays_frozen():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    model = half_off(prifu.wrap(net.requires_grad_(False), bias=True)).requires_grad_(False)
    pruned = prifu.prune(model, torch.zeros(1, 3, 8, 8))
    assert not [name for name, p in pruned.named_parameters() if p.requires_grad]
    with torch.inference_mode():
        again = prifu.prune(model, torch.zeros(1, 3, 8, 8))
    assert not any(p.is_inference() for p in again.parameters())


class TwoInputs(Net):
    def forward(self, x, y=None, flag=True):
        h = self.n(self.f(self.n0(x)))
        if y is not None:
            h = h + self.n(y)
        return self.o(h) if flag else h


def test_optional_inputs():
    model = half_off(prifu.wrap(TwoInputs()))
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(prifu.prune(model, (x, y))(x, y), model(x, y))
    pruned = prifu.prune(model, x)
    torch.testing.assert_close(pruned(x), model(x))
    with pytest.raises(TypeError):
        pruned(x, flag=False)


class Words(Net):
    def forward(self, x):
        return self.o(self.n(self.n0(self.words(x))))


def test_integer_inputs():
    model = half_off(prifu.wrap(Words(words=nn.Embedding(10, 8))))
    x = torch.randint(10, (3, 7))
    torch.testing.assert_close(prifu.prune(model, x)(x), model(x))


class Starred(Net):
    def forward(self, *xs, scale=2.0, **settings):
        return self.o(self.n(self.n0(xs[0] + scale * xs[-1]))) if not settings else None


@dataclasses.dataclass
class Reply(collections.OrderedDict):
    """What transformers return: fields, and a dictionary of those that are not None."""

    logits: torch.Tensor | None = None
    loss: torch.Tensor | None = None

    def __post_init__(self):
        self.update({k: v for k, v in vars(self).items() if v is not None})


def decorated(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return wrapper


class Answering(Net):
    @decorated
    def forward(self, x=None, labels=None, **settings):
        if x is None or settings:
            raise ValueError("no input")
        return Reply(self.o(self.n(self.n0(x))), labels)


@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_inputs(count):
    model = half_off(prifu.wrap(Starred()))
    x = [torch.randn(2, 5, 8) for _ in range(count)]
    pruned = prifu.prune(model, tuple(x))
    assert difference(model(*x), pruned(*x)) <= 1e-6
    assert prifu.report(pruned).parameters[1] < prifu.report(pruned).parameters[0]
    with pytest.raises(TypeError):
        pruned(*x, x[0])


def test_outputs_that_are_dictionaries_of_a_class():
    model = half_off(prifu.wrap(Answering()))
    x = torch.randn(3, 5, 8)
    pruned = prifu.prune(model, x)
    found = pruned(x)
    assert type(found) is Reply
    assert list(found) == ["logits"]
    assert difference(model(x).logits, found.logits) <= 1e-6


class Ordered(Net):
    keys = ("out", "inplace", "input")

    def forward(self, x):
        y = self.o(self.n(self.n0(x)))
        return collections.OrderedDict(zip(self.keys, (y, y + 1, x), strict=True))


@pytest.mark.parametrize(
    "keys", [("out", "inplace", "input"), ("0", "1", "pool"), (0, 1, 2), ("class", "a b", "self")]
)
def test_outputs_stay_ordered_whatever_their_keys(keys):
    net = Ordered()
    net.keys = keys
    model = half_off(prifu.wrap(net))
    x = torch.randn(3, 5, 8)
    pruned = prifu.prune(model, x)
    found = pruned(x)
    assert type(found) is collections.OrderedDict
    assert not [text for _, text in prifu.report(pruned).notes if "no rule" in text]
    assert tuple(found) == keys
    assert difference(dict(model(x)), dict(found)) <= 1e-6


@pytest.mark.parametrize(
    ("net", "inputs", "error"),
    [
        (TwoInputs(), {"x": torch.zeros(2, 5, 8)}, ConfigError),
        (TwoInputs(), (), ConfigError),
        (TwoInputs(), torch.zeros(2, 5, 7), ConfigError),
    ],
)
def test_refused(net, inputs, error):
    with pytest.raises(error):
        prifu.prune(prifu.wrap(net), inputs)


def test_huge_outputs_hide_nothing():
    big = torch.tensor([1.0, 2.0, -1e30, 3.0])
    assert difference(big, big + torch.tensor([0.1, 0.0, 0.0, 0.0])) > 1e-5
    assert difference(big, big * (1 + 1e-12)) < 1e-11


def test_another_architecture_is_not_rebuilt():
    def net(depth):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *[nn.ReLU()] * depth)

    pruned = prifu.prune(half_off(prifu.wrap(net(1))), torch.zeros(1, 3, 8, 8))
    with pytest.raises(prifu.errors.NoSiteError, match="another graph"):
        prifu.rebuild(net(2), prifu.plan(pruned), pruned.state_dict())

    other = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    with pytest.raises(prifu.errors.NoSiteError, match="another graph"):
        prifu.rebuild(other, prifu.plan(pruned), pruned.state_dict())


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    name: str


def test_dataclasses_are_compared_by_field():
    one = Answer(torch.ones(2), "a")
    assert difference(one, Answer(torch.ones(2), "a")) == 0
    assert difference(one, Answer(torch.ones(2) * 1.5, "a")) == 0.5
    assert difference(one, Answer(torch.ones(2), "b")) == float("inf")


def test_an_analysis_that_fails_refuses(monkeypatch):
    def failing(*_):
        raise IndexError("index 3 is out of range")

    monkeypatch.setattr(one_graph, "analyse", failing)
    flat = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    with pytest.raises(CaptureError, match="cannot analyse.*IndexError: index 3 is out of range"):
        prifu.prune(prifu.wrap(flat), torch.zeros(2, 8))


def test_a_vector_is_an_input():
    flat = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    model = half_off(prifu.wrap(flat))
    x = torch.randn(8)
    assert difference(model(x), prifu.prune(model, x)(x)) < 1e-6


def test_a_pruned_model_can_be_saved_whole_and_traced_again():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 4, 3, padding=1)
    )
    model = half_off(prifu.wrap(net, bias=True))
    pruned = prifu.prune(model, torch.zeros(1, 3, 8, 8))
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), pruned(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(pruned)(x), pruned(x))


class PermutingNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_norm_that_permutes_is_filtered_along_its_channels():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), PermutingNorm(8), nn.Conv2d(8, 4, 1))
    assert [site.dim for site in prifu.sites(net)] == [1]
    check(net, (2, 3, 10, 10))
    check(net, (2, 3, 9, 14))


class SettledNorm(nn.LayerNorm):
    """Channels come first or last, as a setting says."""

    def __init__(self, width, first):
        super().__init__(width)
        self.first = first

    def forward(self, x):
        if not self.first:
            return super().forward(x)
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class TokensOrImagesNorm(nn.LayerNorm):
    """Tokens have their channels last, images first."""

    def forward(self, x):
        if x.ndim != 4:
            return super().forward(x)
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize(
    "make",
    [lambda first: SettledNorm(8, first), lambda first: TokensOrImagesNorm(8)],
    ids=["a setting", "the number of dimensions"],
)
def test_one_class_of_norms_may_have_channels_first_and_last(make):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), make(True), nn.Conv2d(8, 8, 1), nn.Flatten(2), Swap(1, 2),
        nn.Linear(8, 8), make(False), nn.Linear(8, 4),
    )  # fmt: skip
    wrapped = prifu.wrap(net, preserve=False)
    x = torch.randn(2, 3, 10, 10)
    assert difference(prifu.filters(wrapped)["1"](net[1](net[0](x))), wrapped[:2](x)) <= 1e-6
    check(net, (2, 3, 10, 10))
    check(net, (2, 3, 9, 10))


def test_volumes_have_channels_where_images_have():
    net = nn.Sequential(nn.Conv3d(3, 6, 1), TokensOrImagesNorm(6))
    wrapped = prifu.wrap(net).eval()
    prifu.filters(wrapped)["1"].weight.data[2] = 0.0
    assert wrapped(torch.randn(2, 3, 5, 5, 6))[:, 2].abs().max() == 0


class Grows(nn.Module):
    """Makes a layer when it is first called."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.extra = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), None

    def forward(self, x):
        if self.extra is None:
            self.extra = nn.Conv2d(6, 4, 1)
        return self.extra(self.norm(self.first(x)))


def test_what_was_none_is_none_again():
    net = Grows().eval()
    wrapped = prifu.wrap(net)
    assert wrapped(torch.randn(2, 3, 4, 4)).shape == (2, 4, 4, 4)


class Swap(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.transpose(*self.dims)


@pytest.mark.parametrize(
    ("net", "shape", "cut", "dim"),
    [
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU()), (2, 3, 12), "2", 1),
        (nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU()), (2, 5, 3), "2", 2),
        (nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU()), (2, 5, 6, 3), "2", 3),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), (2, 3, 8, 8), "2", 1),
    ],
)
def test_the_channels_of_a_cut(net, shape, cut, dim):
    model = prifu.wrap(net, cut=cut, example_inputs=torch.zeros(shape))
    assert model.get_submodule(cut).prifu.dim == dim
    assert prifu.filters(model)[cut].weight.shape == (8,)
    with pytest.raises(ConfigError, match="cut_dim"):
        prifu.wrap(net, cut=cut, cut_dim=7, example_inputs=torch.zeros(shape))


class Gated(nn.Module):
    """A constant that is computed from a parameter, and a norm that reads it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.mix = nn.Parameter(torch.randn(8))
        self.index = nn.Parameter(torch.arange(8.0), requires_grad=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        y = self.bn(self.conv(x))
        gate = torch.sigmoid(self.mix).view(1, -1, 1, 1)
        order = self.index.long()
        return self.norm((y + gate).mean((2, 3))[:, order])


def test_what_is_computed_of_parameters_is_known_in_fp64():
    torch.manual_seed(0)
    model = prifu.wrap(Gated().eval(), bias=True)
    for unit in prifu.filters(model).values():
        unit.weight.data[::2] = 0
        unit.bias.data.normal_()
    pruned = prifu.prune(model, torch.randn(2, 3, 8, 8))
    exact = [check for check in prifu.report(pruned).checks if check.dtype == "float64"]
    assert exact
    assert max(check.difference for check in exact) < 1e-13


class Whitens(nn.Module):
    """Computes with its buffers before the input comes in, in the precision they have."""

    def __init__(self):
        super().__init__()
        self.register_buffer("variance", torch.rand(3) + 0.1)
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        scale = (self.variance.sqrt() + 1e-8).view(1, -1, 1, 1)
        return self.norm(self.conv(x / scale)).sum(1)


def test_what_is_computed_from_buffers_is_computed_in_fp64():
    torch.manual_seed(0)
    model = prifu.wrap(Whitens())
    prifu.filters(model)["norm"].weight.data[::2] = 0.0
    checks = prifu.report(prifu.prune(model, torch.zeros(2, 3, 4, 4))).checks
    assert max(c.difference for c in checks if c.dtype == "float64") < 1e-14


class Threshold(nn.Module):
    """Decides on, and computes with, the values of buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.tensor(0.7))
        self.scale = nn.Parameter(torch.rand(16))
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = nn.functional.layer_norm(x.flatten(2), (16,), self.scale).unflatten(2, (4, 4))
        if self.level > 0:
            x = x.clamp(0.0, float(self.level)) * self.level.item()
        return self.out(x.to(self.level.dtype))


def test_what_forwards_decide_on_buffers_is_decided():
    torch.manual_seed(0)
    model = prifu.wrap(Threshold())
    assert list(prifu.filters(model)) == ["layer_norm", "norm"]
    prifu.filters(model)["norm"].weight.data[::2] = 0.0
    pruned = prifu.prune(model, torch.zeros(2, 3, 4, 4))
    assert max(c.difference for c in prifu.report(pruned).checks) < 1e-6


class Places(nn.Module):
    """A kernel over an axis along which closed channels have constants of their own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.over = nn.Conv2d(2, 4, (3, 1))

    def forward(self, x):
        return self.over(self.norm(self.conv(x)).view(x.shape[0], 2, 4, -1))


@pytest.mark.parametrize("closed", [4, 7, 8])
def test_constants_that_differ_under_a_kernel_are_computed(closed):
    torch.manual_seed(0)
    model = prifu.wrap(Places(), bias=True).eval()
    unit = prifu.filters(model)["norm"]
    unit.bias.data.normal_()
    unit.weight.data[:closed] = 0.0
    pruned = prifu.prune(model, torch.zeros(2, 3, 4, 4))
    assert pruned.get_submodule("conv").out_channels == max(1, 8 - closed)
    assert not any("no rule" in why for _, why in prifu.report(pruned).notes)


@pytest.mark.parametrize(
    ("norm", "left"), [(lambda: nn.RMSNorm(8), 4), (lambda: nn.LayerNorm(8), 8)]
)
def test_zeros_stay_zeros_where_no_mean_is_subtracted(norm, left):
    model = nn.Sequential(nn.Linear(5, 8), norm(), norm(), nn.Linear(8, 3)).double().eval()
    model = prifu.wrap(model, bias=False)
    prifu.filters(model)["1"].weight.data[::2] = 0.0
    pruned = prifu.prune(model, torch.zeros(4, 5))
    assert pruned.get_submodule("3").in_features == left
    x = torch.randn(6, 5, dtype=torch.float64)
    assert difference(model(x), pruned(x)) <= 1e-11


@pytest.mark.parametrize("how", ["amax", "amin", "mean", "sum"])
def test_what_is_reduced_over_constant_channels(how):
    class Reduced(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.b = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(1, 2)

        def forward(self, x):
            y = self.n(self.a(x))
            return self.b(getattr(y, how)(1, keepdim=True))

    net = prifu.wrap(Reduced(), bias=True).eval()
    unit = prifu.filters(net)["n"]
    unit.weight.data.zero_()
    unit.bias.data.copy_(torch.tensor([1.0, 2.0, 3.0, 10.0]))
    x = torch.randn(5, 3)
    torch.testing.assert_close(prifu.prune(net, x)(x), net(x))


class Compiled(nn.Module):
    def __init__(self, kind=None):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.rest = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.rest.append(nn.Conv2d(8, 4, 1))
        if kind == "before":
            self.rest = torch.compile(self.rest, backend="eager")

    def forward(self, x):
        return self.rest(self.first(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["before", "after", "in place"])
def test_compiled_parts_are_pruned_as_what_was_compiled(kind):
    model = half_off(prifu.wrap(Compiled(kind)))
    if kind == "after":
        model.rest = torch.compile(model.rest, backend="eager")
    elif kind == "in place":
        model.rest.compile(backend="eager")
    pruned = prifu.prune(model, torch.zeros(2, 3, 9, 8))
    x = torch.randn(3, 3, 11, 12)
    assert difference(model(x), pruned(x)) < 1e-5
    assert prifu.report(pruned).way == "graph"
    assert pruned.get_submodule("rest.0").out_channels < 8
    again = prifu.rebuild(Compiled(kind), prifu.plan(pruned), pruned.state_dict())
    assert difference(again(x), pruned(x)) == 0
