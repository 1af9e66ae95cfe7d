"""Plausible modules that once came out wrong, or as an error of torch's own."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import prifu_plugin as prifu
from prifu_plugin.errors import CaptureError, ConfigError, VerificationError
from prifu_plugin.graph.padding import only_pads
from prifu_plugin.prune.verify import difference


def half_off(net, closed=slice(0, None, 2), **settings):
    torch.manual_seed(0)
    model = prifu.wrap(net, **settings).eval()
    for unit in prifu.filters(model).values():
        unit.weight.data[closed] = 0.0
        if unit.bias is not None:
            unit.bias.data.normal_()
    return model


class Between(nn.Module):
    """Something between a filtered norm and the convolution that reads it."""

    def __init__(self, body):
        super().__init__()
        self.c, self.n, self.t = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 1),
        )
        self.body = body

    def forward(self, x):
        return self.t(self.body(self.n(self.c(x))))


class Guarded(nn.Module):
    def forward(self, x):
        return x.clamp(min=-30) if x.min() < -30 else x


class Turned(nn.Module):
    def forward(self, x):
        return x if x.max() > 0 else -x


@pytest.mark.parametrize(
    "body",
    [
        lambda h: torch.clamp_min(h, -20),
        lambda h: h.clamp_min(-20),
        lambda h: F.threshold(h, -20, -20),
        Guarded(),
        Turned(),
    ],
    ids=["clamp_min", "method", "threshold", "a decision", "a turn"],
)
def test_what_changes_only_large_values_is_no_movement(body):
    model = half_off(Between(body).double())
    pruned = prifu.prune(model, torch.randn(2, 3, 8, 8))
    for scale in (1.0, 100.0, -1e6):
        x = scale * torch.rand(3, 3, 8, 8, dtype=torch.float64)
        assert difference(model(x), pruned(x)) < 1e-11


class Bounded(nn.Module):
    """Refuses large values."""

    def forward(self, x):
        if x.abs().max() > 1e6:
            raise ValueError("too large")
        return x


def test_an_operation_that_refuses_values_is_kept_whole():
    model, x = half_off(Between(Bounded())), torch.randn(2, 3, 8, 8)
    pruned = prifu.prune(model, x)
    assert difference(model(x), pruned(x)) < 1e-5
    assert any("Bounded" in why for _, why in prifu.report(pruned).notes)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Reversed(nn.Module):
    def forward(self, x):
        return Reversal.apply(x)


def test_an_identity_with_a_gradient_of_its_own_stays():
    model = half_off(Between(Reversed()).double())
    pruned = prifu.prune(model, torch.randn(2, 3, 8, 8))
    found = []
    for net in (model, pruned):
        x = torch.ones(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
        net(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


class Tokens(nn.Module):
    def __init__(self, crop):
        super().__init__()
        self.f, self.n, self.o, self.crop = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4), crop

    def forward(self, x):
        return self.o(self.crop(self.n(self.f(x))))


@pytest.mark.parametrize(
    "crop",
    [
        lambda h: h[:, -64:],
        lambda h: h[..., -64:, :],
        lambda h: h.split(64, 1)[0],
        lambda h: torch.split(h, 64, dim=1)[0],
    ],
    ids=["from the end", "ellipsis", "split", "torch.split"],
)
def test_crops_that_no_run_was_long_enough_for(crop):
    model = half_off(Tokens(crop).double())
    pruned = prifu.prune(model, torch.randn(2, 10, 8))
    x = torch.randn(2, 70, 8, dtype=torch.float64)
    assert model(x).shape == pruned(x).shape
    assert difference(model(x), pruned(x)) < 1e-11


class Weighted(Between):
    """Takes an input without a batch."""

    def forward(self, x, t):
        return super().forward(x) * t.view(1, 4, 1, 1)


@pytest.mark.parametrize(
    "body",
    [
        lambda h: h + h.roll(8, 2),
        lambda h: h[..., -8:, -8:],
        lambda h: torch.relu(h.flatten(0, 1)).softmax(-1).view(h.shape),
        lambda h: h + h.flip(0).roll(1, 0),
    ],
    ids=["roll", "crop", "softmax", "flip"],
)
@pytest.mark.parametrize("size", [(3, 3, 8, 8), (2, 3, 12, 10)])
def test_an_input_without_a_batch_leaves_the_others_theirs(body, size):
    model = half_off(Weighted(body).double(), bias=True)
    pruned = prifu.prune(model, (torch.randn(2, 3, 8, 8), torch.randn(4)))
    x, t = torch.randn(size, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert difference(model(x, t), pruned(x, t)) < 1e-11


class FixedBatch(Between):
    """Takes one batch size, and one size of images."""

    def forward(self, x):
        if x.shape[0] != 2:
            raise ValueError("two at a time")
        return super().forward(x)[:, :, :8] * torch.ones(2, 1, 8, 8)


def test_what_was_seen_at_one_size_is_refused_at_others():
    model = half_off(FixedBatch(lambda h: h + h.roll(8, 2)))
    pruned = prifu.prune(model, torch.randn(2, 3, 8, 8))
    assert difference(model(x := torch.randn(2, 3, 8, 8)), pruned(x)) < 1e-5
    with pytest.raises((AssertionError, ValueError)):
        pruned(torch.randn(3, 3, 8, 8))


class Attended(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.n, self.o = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x, mask):
        y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.n(self.v(x)), attn_mask=mask)
        return self.o(y)


def test_rows_that_a_mask_hides_whole_are_zero():
    model = half_off(Attended().double(), bias=True)
    mask = torch.ones(2, 12, 12, dtype=torch.bool)
    pruned = prifu.prune(model, (torch.randn(2, 12, 8), mask))
    mask[1] = False
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    assert difference(model(x, mask), pruned(x, mask)) < 1e-11


def test_a_fixed_mask_that_hides_no_row_lets_constants_go():
    class Biased(Attended):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.randn(12, 12))

        def forward(self, x):
            return super().forward(x, self.mask)

    model = half_off(Biased(), bias=True)
    x = torch.randn(2, 12, 8)
    pruned = prifu.prune(model, x)
    assert difference(model(x), pruned(x)) < 1e-5
    assert pruned.get_submodule("o").in_features == 4


@pytest.mark.parametrize("name", ["meta", "graph", "code"])
def test_submodules_named_as_torch_fx_names_its_own(name):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.n, self.o = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(16, 2)
            self.add_module(name, nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU()))

        def forward(self, x, t):
            images = self.n(self.c(x)).mean((2, 3))
            return self.o(torch.cat([images, self.get_submodule(name)(t)], 1))

    x, t = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
    model = half_off(Branches())
    pruned = prifu.prune(model, (x, t))
    assert difference(model(x, t), pruned(x, t)) < 1e-5
    assert prifu.report(copy.deepcopy(pruned)).checks


class Stream(Between):
    """Adds what it saw last."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.last = None

    def forward(self, x):
        h = self.n(self.c(x))
        y = h if self.last is None else h + self.last
        self.last = h
        return self.t(y)


def test_a_forward_that_remembers_is_refused():
    with pytest.raises(CaptureError, match="it remembers"):
        prifu.prune(half_off(Stream()), torch.randn(2, 3, 8, 8))


class Flat(nn.Module):
    def __init__(self, contiguous):
        super().__init__()
        self.n, self.o, self.p = nn.LayerNorm(8), nn.Linear(40, 4), nn.Conv1d(8, 4, 1)
        self.contiguous = contiguous

    def forward(self, x):
        h = self.n(x)
        if not self.contiguous:
            return self.o(h.view(h.shape[0], -1))
        turned = h.transpose(1, 2)
        c = turned.contiguous()
        return self.o(c.view(c.shape[0], -1)) + self.p(c).mean(2) + self.p(turned).mean(2)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("closed", [slice(4, None), slice(0, None, 2)])
def test_views_of_what_a_slice_left_elsewhere(contiguous, closed):
    model, x = half_off(Flat(contiguous), closed), torch.randn(2, 5, 8)
    assert difference(model(x), prifu.prune(model, x)(x)) < 1e-5


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n, self.o = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.n(self.c(x)).mean((2, 3))
        return self.o(h if x.shape[0] > 1 else h * 2)


def test_a_batch_of_one_that_is_decided_otherwise_is_refused_when_it_comes():
    model = half_off(One())
    pruned = prifu.prune(model, torch.randn(2, 3, 8, 8))
    assert difference(model(x := torch.randn(5, 3, 8, 8)), pruned(x)) < 1e-5
    with pytest.raises(AssertionError, match="other input sizes"):
        pruned(torch.randn(1, 3, 8, 8))


class MaskedLinear(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.ones(outputs, inputs))

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Adapted(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.a, self.b = (
            nn.Parameter(torch.randn(2, inputs)),
            nn.Parameter(torch.zeros(outputs, 2)),
        )

    def forward(self, x):
        return super().forward(x) + x @ self.a.t() @ self.b.t()


@pytest.mark.parametrize("kind", [MaskedLinear, Adapted])
def test_linear_layers_with_more_of_their_own_are_kept_whole(kind):
    model, x = (
        half_off(nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), kind(8, 4))),
        torch.randn(2, 5),
    )
    pruned = prifu.prune(model, x)
    assert difference(model(x), pruned(x)) < 1e-5
    assert any(kind.__name__ in why for _, why in prifu.report(pruned).notes)


def test_integers_are_drawn_from_the_least_that_was_shown():
    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.r = nn.LayerNorm(8), nn.GRU(8, 6, batch_first=True)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(
                self.n(x), lengths, batch_first=True, enforce_sorted=False
            )
            return self.body(self.r(packed)[1][-1])

    model, given = half_off(Lengths()), (torch.randn(2, 5, 8), torch.tensor([5, 3]))
    assert difference(model(*given), prifu.prune(model, given)(*given)) < 1e-5


def test_complex_inputs_are_refused_in_words():
    with pytest.raises(ConfigError, match="complex.*view_as_real"):
        prifu.prune(
            half_off(Between(nn.Identity())), torch.zeros(2, 3, 8, 8, dtype=torch.complex64)
        )


class Deciding(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
        self.inner = nn.Sequential(*layers)

    def forward(self, x):
        return self.inner(x / 1e3 if x.mean() > 1e3 else x)


def test_a_part_that_is_kept_whole_is_named():
    model = half_off(nn.Sequential(Deciding(), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    notes = prifu.report(prifu.prune(model, torch.randn(2, 3, 8, 8))).notes
    assert any("Deciding" in why and "with its filters" in why for _, why in notes)


def test_the_report_survives_a_pickle_and_random_numbers_are_the_callers():
    model, x = half_off(Between(nn.Identity())), torch.randn(2, 3, 8, 8)
    torch.manual_seed(3)
    pruned = prifu.prune(model, x)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    for twin in (pickle.loads(pickle.dumps(pruned)), copy.deepcopy(pruned)):
        assert prifu.report(twin) == prifu.report(pruned)
        assert prifu.plan(twin) == prifu.plan(pruned)


@pytest.mark.parametrize(
    "body",
    [
        nn.PReLU(),
        nn.PReLU(8),
        lambda h: torch.max(h, h * 0.5),
        lambda h: h.max(h * 0.5),
        lambda h: h.amax((2, 3), keepdim=True),
        lambda h: F.adaptive_max_pool1d(h.flatten(2), 3)[..., None],
        lambda h: F.max_pool1d(h.flatten(2), 3)[..., None],
    ],
    ids=["PReLU", "PReLU by channel", "torch.max", "max", "amax", "adaptive", "1-d"],
)
def test_channels_pass_through(body):
    model, x = half_off(Between(body)), torch.randn(2, 3, 8, 8)
    pruned = prifu.prune(model, x)
    assert difference(model(x), pruned(x)) < 1e-5
    assert pruned.get_submodule("t").in_channels == 4
    assert not prifu.report(pruned).notes


def test_weights_that_are_shared_no_more_are_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.n, self.o = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 20)
            self.o.weight = self.words.weight

        def forward(self, x):
            return self.o(self.n(self.words(x)))

    model, x = half_off(Tied()), torch.randint(20, (2, 5))
    report = prifu.report(prifu.prune(model, x))
    assert ("words.weight", "shared with 'o.weight', and separate in the pruned model") in (
        report.notes
    )


def test_attention_is_counted_whatever_kernel_computes_it():
    model, x = half_off(Attended()), (torch.randn(2, 12, 8), torch.zeros(12, 12))
    before, after = prifu.report(prifu.prune(model, x)).macs
    assert before == 12 * 8 * (8 * 3 + 4) + 2 * 12 * 12 * 8
    assert after < before


class EvenlyPadded(nn.Conv2d):
    """Pads as much as its size needs, with a forward of its own."""

    def forward(self, x):
        height, width = (
            -(size // -self.stride[0]) * self.stride[0] - size for size in x.shape[-2:]
        )
        return super().forward(F.pad(x, (1, 1 + width, 1, 1 + height)))


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_convolutions_that_only_pad_are_known_by_what_they_do():
    assert only_pads(EvenlyPadded(3, 4, 3, stride=2))
    assert not only_pads(Standardized(3, 4, 3, padding=1))
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), EvenlyPadded(8, 8, 3, stride=2),
        nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    model = half_off(net, bias=True).double()
    pruned = prifu.prune(model, torch.randn(2, 3, 12, 12))
    for size in ((12, 12), (15, 18)):
        x = torch.randn(3, 3, *size, dtype=torch.float64)
        assert difference(model(x), pruned(x)) < 1e-11
    assert pruned.get_submodule("3").out_channels == 4


def test_convolutions_that_compute_their_weight_are_looked_into():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Standardized(8, 8, 3, padding=1),
        nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    pruned = prifu.prune(half_off(net), torch.randn(2, 3, 12, 12))
    ((_, why),) = prifu.report(pruned).notes
    assert "its weight is computed" in why
    before, after = prifu.report(pruned).macs
    assert after < 0.4 * before


class Words(nn.Module):
    """Takes indices as floats."""

    def __init__(self):
        super().__init__()
        self.words, self.a = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.n, self.b = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.n(self.a(self.words(x.long()))).mean(1))


class Logarithms(nn.Module):
    """Gives nothing finite for numbers below 0."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.n(self.a(x.log())))


@pytest.mark.parametrize(
    ("kind", "x"),
    [(Words, torch.arange(20.0).reshape(4, 5) % 10), (Logarithms, torch.linspace(0.1, 2, 40))],
)
def test_numbers_are_drawn_from_what_was_shown_where_gaussian_ones_will_not_do(kind, x):
    x = x.reshape(5, 8) if kind is Logarithms else x
    net = kind()
    wrapped = half_off(net)
    pruned = prifu.prune(wrapped, x)
    assert all(check.holds for check in prifu.report(pruned).checks)
    torch.testing.assert_close(pruned(x), wrapped(x))
    again = prifu.rebuild(kind(), prifu.plan(pruned), pruned.state_dict())
    assert torch.equal(again(x), pruned(x))
    place = prifu.cut_points(wrapped, x)[0]
    edge, cloud = prifu.split(wrapped, place, x)
    assert torch.equal(cloud(edge(x)), wrapped(x))
    with pytest.raises((ConfigError, VerificationError)):
        prifu.prune(wrapped, torch.zeros_like(x))


def then_cut(self, z):
    z = z + 1
    z.relu_()
    return torch.cat([z[:, :4], z[:, 4:]], 1)


def by_a_mask(self, z):
    z = z.clone()
    z[z < 0] = 0
    return z


IDIOMS = {
    "in place, and a view of the result": then_cut,
    "a number where a mask says so": by_a_mask,
    "limits of a type": lambda self, z: z.clamp(min=torch.finfo(z.dtype).min),
    "numpy on a size": lambda self, z: z / np.sqrt(z.shape[1]),
    "the length of a batch": lambda self, z: z.reshape(len(z), 8, -1).reshape(z.shape),
    "checkpointed": lambda self, z: checkpoint(torch.relu, z, use_reentrant=False),
    "checkpointed, reentrant": lambda self, z: checkpoint(torch.relu, z, use_reentrant=True),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("body", IDIOMS.values(), ids=IDIOMS)
def test_idioms_are_followed(body):
    wrapped = half_off(Between(lambda z: body(None, z)))
    x = torch.randn(2, 3, 8, 8)
    pruned = prifu.prune(wrapped, x)
    assert pruned.get_submodule("c").out_channels <= 5
    for count in (1, 3):
        z = torch.randn(count, 3, 8, 8)
        torch.testing.assert_close(pruned(z), wrapped(z))


def test_a_scripted_part_stays_one_call():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    wrapped, x = half_off(Between(scripted)), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(prifu.prune(wrapped, x)(x), wrapped(x))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_networks_that_checkpoint_are_pruned_whole(name):
    net = timm.create_model(name, num_classes=3)
    net.set_grad_checkpointing(True)
    size = 160 if "vit" in name else 64
    wrapped, x = half_off(net), torch.randn(2, 3, size, size)
    pruned = prifu.prune(wrapped, x)
    assert not any("in parts" in why for _, why in prifu.report(pruned).notes)
    assert prifu.cut_points(wrapped, x)
    torch.testing.assert_close(pruned(x), wrapped(x))


def test_a_hook_that_changes_what_a_layer_returns_is_named():
    net = Between(nn.ReLU())
    net.body.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(VerificationError, match="Take the forward hook of 'body' off"):
        prifu.prune(half_off(net), torch.randn(2, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("trained", [True, False])
def test_a_scripted_part_with_parameters_stays_one_call(trained):
    torch.manual_seed(0)
    part = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()).requires_grad_(trained)
    scripted = torch.jit.script(part)
    model = prifu.wrap(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), scripted)).eval()
    prifu.filters(model)["1"].weight.data[:4] = 0.0
    pruned = prifu.prune(model, torch.zeros(2, 3, 8, 8))
    x = torch.randn(3, 3, 9, 7)
    torch.testing.assert_close(pruned(x), model(x))
    assert all(p.requires_grad is trained for p in pruned.get_submodule("2").parameters())
