"""Models whose forward cannot be followed: their parts are pruned inside their own Python."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import CaptureError, ConfigError, OrderError, VerificationError
from prifu_plugin.prune.parts import _Work
from prifu_plugin.prune.verify import difference


def block(inputs, outputs):
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Deciding(nn.Module):
    """Decides on values, asks a part for an attribute, and looks inside another."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(block(3, 16), block(16, 16))
        self.body.width = 16
        self.looked_into = nn.Sequential(block(16, 8), block(8, 8))
        self.between = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        h = self.body(x)
        assert h.shape[1] == self.body.width
        if float(h.detach().mean()) > 1e6:  # on the value of a tensor
            h = h * 0
        for layer in self.looked_into:
            h = layer(h)
        return {"logits": self.head(self.between(h).mean((2, 3))), "width": self.body.width}


def half_off(model, bias=False):
    torch.manual_seed(0)
    for unit in prifu.filters(model).values():
        unit.weight.data = torch.where(torch.arange(len(unit.weight)) % 2 == 0, 0.1, 0.0)
        if unit.bias is not None:
            unit.bias.data.normal_()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.bias.data.normal_()
    return model.eval()


class TokensOrImagesNorm(nn.LayerNorm):
    """Tokens have their channels last, images first."""

    def forward(self, x):
        if x.ndim != 4:
            return super().forward(x)
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class DecidingOnRanks(Deciding):
    """Calls one norm of its own with images and with tokens."""

    def __init__(self):
        super().__init__()
        self.between = TokensOrImagesNorm(8)

    def forward(self, x):
        h = self.between(self.looked_into(self.body(x)))
        if float(h.detach().mean()) > 1e6:
            h = h * 0
        return self.head(self.between(h.mean((2, 3))[:, None])[:, 0])


def test_no_filter_is_left_in_a_norm_that_takes_images_and_tokens():
    model = half_off(prifu.wrap(DecidingOnRanks(), bias=True))
    assert prifu.filters(model)["between"].image_dim == 1
    pruned = prifu.prune(model, torch.zeros(2, 3, 12, 12))
    x = torch.randn(4, 3, 20, 16)
    assert difference(model(x), pruned(x)) < 1e-5
    assert not any("prifu" in key for key in pruned.state_dict())


@pytest.mark.parametrize("bias", [False, True])
def test_the_largest_parts_are_pruned_and_the_python_stays(bias):
    torch.manual_seed(0)
    model = half_off(prifu.wrap(Deciding(), bias=bias))
    pruned = prifu.prune(model, torch.zeros(2, 3, 12, 12))
    x = torch.randn(4, 3, 20, 16)
    assert difference(model(x), pruned(x)) < 1e-5
    assert isinstance(pruned, Deciding)
    assert torch.equal(pruned(x)["logits"], copy.deepcopy(pruned)(x)["logits"])
    assert not any(isinstance(m, prifu.PriFU) for m in pruned.modules())
    widths = {n: m.out_channels for n, m in pruned.named_modules() if isinstance(m, nn.Conv2d)}
    assert widths["body.0.0"] == 8
    report = prifu.report(pruned)
    assert report.saved > 0.2  # a part takes and returns all of its channels
    assert all(check.holds for check in report.checks)
    assert any("looked_into" in path and "not pruned as one" in why for path, why in report.notes)
    assert "pruned in parts" in str(report)
    with pytest.raises(ConfigError, match="in parts"):
        prifu.plan(pruned)
    pruned.train()
    pruned(x)["logits"].sum().backward()
    assert pruned.get_submodule("body.0.0").weight.grad is not None


def test_the_wrapped_model_is_not_changed():
    model = half_off(prifu.wrap(Deciding()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prifu.prune(model, torch.zeros(2, 3, 12, 12))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert len(prifu.filters(model)) == 5


def test_where_no_part_can_be_followed_nothing_is_returned():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x) if float(x.sum()) > 1e9 else self.norm(x) + 1

    with pytest.raises(CaptureError, match="Alone cannot be traced"):
        prifu.prune(prifu.wrap(Alone()).eval(), torch.zeros(2, 3, 4, 4))


def test_a_report_of_something_else():
    with pytest.raises(ConfigError, match="not made by"):
        prifu.report(nn.Linear(2, 2))
    with pytest.raises(OrderError):
        prifu.prune(nn.Linear(2, 2), torch.zeros(2, 2))


@pytest.mark.zoo
def test_a_detector():
    torch.manual_seed(0)
    settings = {"weights": None, "weights_backbone": None}
    net = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(**settings)
    model = half_off(prifu.wrap(net.eval()))
    pruned = prifu.prune(model, torch.rand(2, 3, 96, 96))
    x = [torch.rand(3, 120, 100)]
    with torch.no_grad():
        expected, found = model(x), pruned(x)
    assert difference(expected, found) < 1e-4
    assert prifu.report(pruned).parameters[1] < prifu.report(pruned).parameters[0]


class Rounding(Deciding):
    """Returns a digit of values that fp32 does not reach."""

    def forward(self, x):
        h = self.looked_into(self.body(x))
        if float(h.detach().mean()) > 1e6:
            h = h * 0
        return (self.between(h) * 1e7).round() % 2


def test_decisions_that_rounding_changes_are_judged_in_fp64():
    torch.manual_seed(0)
    model = half_off(prifu.wrap(Rounding(), bias=True), bias=True)
    x = torch.randn(4, 3, 12, 12)
    assert not torch.equal(model(x), copy.deepcopy(model).double()(x.double()))
    report = prifu.report(prifu.prune(model, torch.zeros(2, 3, 12, 12)))
    assert any("rounding changes" in why for _, why in report.notes)
    assert {check.dtype for check in report.checks} == {"float64", "float32"}


def test_a_whole_that_repeats_itself_must_agree(monkeypatch):
    torch.manual_seed(0)
    model = half_off(prifu.wrap(Deciding()))
    keep = _Work._put

    def spoiled(work, path, part, one):
        one.model.register_forward_hook(lambda *given: given[-1] * 1.01)
        return keep(work, path, part, one)

    monkeypatch.setattr(_Work, "_put", spoiled)
    with pytest.raises(VerificationError, match="float32"):
        prifu.prune(model, torch.zeros(2, 3, 12, 12))


class LooksInsideLarge(nn.Module):
    """Asks a part for what is inside, at large images only."""

    def __init__(self, asks):
        super().__init__()
        self.body = Body()
        self.head = block(8, 8)
        self.asks = asks

    def forward(self, x):
        h = self.body(x)
        if float(h.detach().mean()) > 1e6:
            h = h * 0
        return self.head(self.asks(self.body, x, h))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = block(3, 8), block(8, 8)

    def features(self, x):
        return self.last(self.first(x)) * 2

    def forward(self, x):
        return self.last(self.first(x))


LARGE = {
    "part": lambda body, x, h: h * body.first[0].weight.sum() if x.shape[-1] > 20 else h,
    "method": lambda body, x, h: body.features(x) if x.shape[-1] > 20 else h,
    "class": lambda body, x, h: h * 2 if isinstance(body, Body) else h,
}


@pytest.mark.parametrize("asks", LARGE.values(), ids=list(LARGE))
def test_what_the_python_around_a_part_does_at_other_sizes_is_seen(asks):
    torch.manual_seed(0)
    model = half_off(prifu.wrap(LooksInsideLarge(asks)))
    pruned = prifu.prune(model, torch.zeros(2, 3, 12, 12))
    for size in (12, 24, 40):
        x = torch.randn(3, 3, size, size)
        assert difference(model(x), pruned(x)) < 1e-5
    report = prifu.report(pruned)
    assert report.parameters[1] < report.parameters[0]
    assert any(path == "body" and "around it" in why for path, why in report.notes)


def test_norms_that_the_python_around_them_reads_are_refused():
    """Their filters are built into what it reads."""
    model = half_off(
        prifu.wrap(
            LooksInsideLarge(
                lambda body, x, h: h * body.first[1].weight.sum() if x.shape[-1] > 20 else h
            )
        )
    )
    with pytest.raises(VerificationError, match="reads the weights of a norm"):
        prifu.prune(model, torch.zeros(2, 3, 12, 12))
