"""prune on small networks: the hard topologies one by one, bad input, what the result can do."""

import copy
import pickle
import re

import pytest
import timm
import torch
import zoo
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import (
    ConfigError,
    FilterError,
    NoSiteError,
    OrderError,
    VerificationError,
)
from prifu_plugin.keyed import KeyedNoise


class Residual(nn.Module):
    """Two branches with masks of their own, added to a trunk, then a padded convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Sigmoid())
        self.out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return self.out(self.left(x) + self.right(x) + x)


def wrapped_with(net, masks, bias=False, value=0.3):
    """Wrap a network and close the channels whose mask is 0."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_()
    model = prifu.wrap(net, bias=bias).double().eval()
    for path, mask in masks.items():
        unit = prifu.filters(model)[path]
        unit.weight.data = 0.1 * torch.tensor(mask, dtype=torch.float64)
        if bias:
            unit.bias.data.fill_(value)
    return model


def exact(model, *shapes, **settings):
    pruned = prifu.prune(model, torch.zeros(shapes[0]), **settings)
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(pruned(x), model(x), rtol=1e-11, atol=1e-11)
    return pruned


MASKS = {
    "stem.1": [1, 1, 0, 0, 1, 0, 1, 0],
    "left.1": [1, 0, 1, 0, 0, 0, 0, 1],
    "right.1": [0, 0, 0, 1, 0, 0, 1, 1],
}
SHAPES = [(2, 3, 9, 8), (1, 3, 9, 8), (3, 3, 5, 13)]


@pytest.mark.parametrize("bias", [False, True])
def test_residual_branches_with_different_masks(bias):
    pruned = exact(wrapped_with(Residual(), MASKS, bias), *SHAPES)
    assert pruned.get_submodule("left.0").out_channels <= 3 + bias
    assert pruned.get_submodule("stem.0").out_channels <= 4 + bias
    # Sigmoid(0) is 0.5: the closed channels of the right branch are constants in the trunk.
    assert pruned.get_submodule("out").in_channels <= 8


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dead", ["stem.1", "left.1", "right.1"])
def test_a_whole_dead_layer(dead, bias):
    masks = {**MASKS, dead: [0] * 8}
    pruned = exact(wrapped_with(Residual(), masks, bias), *SHAPES)
    if dead == "left.1" and not bias:
        assert not any(name.startswith("left.0") for name, _ in pruned.named_modules())


@pytest.mark.parametrize("bias", [False, True])
def test_everything_dead_still_has_the_batch_of_its_input(bias):
    masks = dict.fromkeys(MASKS, [0] * 8)
    pruned = exact(wrapped_with(Residual(), masks, bias), *SHAPES)
    assert pruned(torch.zeros(5, 3, 9, 8, dtype=torch.float64)).shape == (5, 4, 9, 8)


@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_and_grouped(bias):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, padding=1, groups=8),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1, groups=4), nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    masks = {"1": [1, 0, 1, 0, 0, 1, 0, 1], "3": [1, 0] * 4 + [0] * 4 + [1] * 4}
    pruned = exact(wrapped_with(net, masks, bias), *SHAPES)
    assert pruned.get_submodule("2").groups <= 5 + bias
    assert pruned.get_submodule("5").groups <= 4


def test_shuffle_and_concat_need_no_gather():
    class Shuffle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.b = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.out = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            y = torch.cat([self.a(x), self.b(x)], 1)
            b, c, h, w = y.size()
            return self.out(y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))

    pruned = exact(wrapped_with(Shuffle(), {"a.1": [1, 0, 0, 1], "b.1": [0, 1, 0, 0]}), *SHAPES)
    assert pruned.get_submodule("out").in_channels == 3
    assert {str(n.target) for n in pruned.graph.nodes if n.op == "call_method"} == set()


def test_gate_kills_both_factors():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
            self.squeeze, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
            self.out = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = self.body(x)
            gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
            return self.out(x * gate)

    pruned = exact(wrapped_with(Gate(), {"body.1": [1, 0, 0, 1, 0, 0]}), *SHAPES)
    assert pruned.get_submodule("excite").out_channels == 2
    assert pruned.get_submodule("squeeze").in_channels == 2


def test_reused_modules_are_sliced_at_each_call():
    class Reuse(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.b = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.shared = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.shared(self.a(x)) - self.shared(self.b(x))

    exact(wrapped_with(Reuse(), {"a.1": [1, 0, 0, 1], "b.1": [0, 1, 1, 1]}), *SHAPES)


def test_unknown_operations_are_named_and_sound():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.out = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.out(self.a(x).cumsum(1))

    pruned = exact(wrapped_with(Odd(), {"a.1": [1, 0, 0, 1]}), *SHAPES)
    assert prifu.report(pruned).notes == (("cumsum", "no rule for cumsum: inputs made whole"),)


def test_round_to():
    masks = {**MASKS, "left.1": [1, 0, 0, 0, 0, 0, 0, 1]}
    pruned = exact(wrapped_with(Residual(), masks), *SHAPES, round_to=4)
    assert pruned.get_submodule("left.0").in_channels % 4 == 0
    with pytest.raises(ConfigError, match="round_to=0"):
        prifu.prune(wrapped_with(Residual(), MASKS), torch.zeros(SHAPES[0]), round_to=0)


def test_the_report_knows_the_fate_of_every_channel():
    pruned = prifu.prune(wrapped_with(Residual(), MASKS, bias=True), torch.zeros(SHAPES[0]))
    report = prifu.report(pruned)
    left = next(fate for fate in report.layers if fate.path == "left.0")
    assert left.needed == 3
    assert left.removed + left.needed + left.constant + left.whole == left.channels == 8
    assert report.macs[1] < report.macs[0]
    assert prifu.PruneReport.from_dict(report.to_dict()) == report
    assert "exact: float64" in str(report)


def test_cut_noise_survives_pruning():
    net = wrapped_with(Residual(), {})
    net = prifu.unwrap(net)
    example = torch.zeros(SHAPES[0], dtype=torch.float64)
    model = prifu.wrap(net, cut="left", noise=0.3, example_inputs=example).eval()
    unit = prifu.filters(model)["left"]
    unit.weight.data[:5] = 0.0
    pruned = prifu.prune(model, torch.zeros(SHAPES[0]))
    x = torch.randn(SHAPES[0], dtype=torch.float64)
    draws = [torch.stack([m(x).detach() for _ in range(300)]) for m in (model, pruned)]
    torch.testing.assert_close(draws[0].std(0), draws[1].std(0), rtol=0.25, atol=0.05)


def test_a_keyed_cut_answers_the_same_when_pruned():
    net = prifu.unwrap(wrapped_with(Residual(), {})).float()
    example = torch.zeros(SHAPES[0])
    model = prifu.wrap(net, cut="left", noise=0.3, example_inputs=example).eval()
    for _ in range(30):  # a fresh model, to rebuild from, has no statistics
        model.train()(3 * torch.randn(SHAPES[0]) + 1)
    model.eval().get_submodule("left.prifu").key = bytes(range(32))
    prifu.filters(model)["left"].weight.data[:5] = 0.0
    pruned = prifu.prune(model, example)
    x = torch.randn(SHAPES[0])
    assert torch.equal(pruned(x), pruned(x))
    assert torch.equal(pruned(x), copy.deepcopy(pruned)(x))
    assert not torch.equal(pruned(x), pruned(x + 1e-6))
    assert any("secret key" in why for _, why in prifu.report(pruned).notes)
    assert bytes(range(32)).hex() not in prifu.plan(pruned).to_json()
    before = prifu.plan(pruned).to_json().replace('"finest": ', '"keyed": true, "unused": ')
    before = re.sub(r', "unused": [^,}]+', "", before)
    prifu.rebuild(net, before, pruned.state_dict())  # a plan that did not tell how fine it is
    again = prifu.rebuild(net, prifu.plan(pruned), pruned.state_dict())
    assert not torch.equal(again(x), again(x))  # the key is no part of plan or weights
    for part in again.modules():
        if isinstance(part, KeyedNoise):
            part.key = bytes(range(32))
    assert torch.equal(again(x), pruned(x))


def test_the_input_shape_is_remembered_or_asked_for():
    model = wrapped_with(Residual(), MASKS)
    with pytest.raises(ConfigError, match="example_inputs"):
        prifu.prune(model)
    model(torch.zeros(2, 3, 9, 8, dtype=torch.float64))
    assert prifu.report(prifu.prune(model)).checks[0].shapes == ((1, 3, 9, 8),)
    small = prifu.wrap(timm.create_model("test_resnet", num_classes=2))
    assert prifu.report(prifu.prune(small)).checks[0].shapes == ((1, 3, 160, 160),)


@pytest.mark.parametrize("chans", [1, 6])
def test_the_input_shape_of_timm_models(chans):
    model = prifu.wrap(timm.create_model("test_vit", num_classes=2, in_chans=chans))
    assert prifu.report(prifu.prune(model)).checks[0].shapes == ((1, chans, 160, 160),)


def test_a_parameter_given_to_a_module_does_not_stop_the_count():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.drop = nn.Parameter(torch.ones(1, 4)), nn.Dropout()
            self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.norm(x + self.drop(self.place.expand(x.shape[0], -1))))

    pruned = prifu.prune(prifu.wrap(Net()), torch.zeros(2, 4))
    assert prifu.report(pruned).macs == (8, 8)
    assert all(parameter.requires_grad for parameter in pruned.parameters())


def test_a_tie_is_decided_once():
    # 0.1 is alpha * 1.0 in fp32, but not in fp64: the mask of the model's own precision holds.
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    model = prifu.wrap(net).eval()
    weight = prifu.filters(model)["1"].weight.data
    weight.fill_(0.1)
    weight[0] = 1.0
    assert prifu.summary(model).open == 1
    pruned = prifu.prune(model, torch.zeros(1, 3, 8, 8))
    assert pruned.get_submodule("0").out_channels == 1
    checks = prifu.report(pruned).checks
    assert all(check.tolerance <= 1e-3 and check.rounding < 1e-4 for check in checks)


def test_bad_input_is_refused():
    model = wrapped_with(Residual(), MASKS)
    with pytest.raises(ConfigError, match=r"refuses inputs.*\(1, 5, 9, 8\)"):
        prifu.prune(model, torch.zeros(1, 5, 9, 8))
    with pytest.raises(OrderError, match="not wrapped"):
        prifu.prune(prifu.unwrap(model), torch.zeros(1, 3, 9, 8))
    with pytest.raises(ConfigError, match="not made by"):
        prifu.report(model)
    prifu.filters(model)["left.1"].weight.data[2] = float("nan")
    with pytest.raises(FilterError, match="left.1"):
        prifu.prune(model, torch.zeros(1, 3, 9, 8))


def test_a_wrong_rewrite_is_caught_and_located(monkeypatch):
    from prifu_plugin.prune import rewrite

    def wrong(module, kernel, bias, delta):
        twin = original(module, kernel, bias, delta)
        twin.weight.data[0] += 1e-3
        return twin

    original = rewrite.slice_linear
    monkeypatch.setattr(rewrite, "slice_linear", wrong)
    model = wrapped_with(Residual(), MASKS)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(VerificationError, match="'stem_0'.*Nothing was changed"):
        prifu.prune(model, torch.zeros(SHAPES[0]))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_result_trains_pickles_compiles_and_exports():
    model = zoo.half_off(prifu.wrap(zoo.build("test_resnet")))
    pruned = prifu.prune(model, torch.zeros(1, 3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    expected = pruned(x).detach()
    for twin in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert torch.equal(twin(x), expected)
    compiled = torch.compile(pruned, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(pruned, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(torch.cat([x, x])), torch.cat([expected, expected]))
    pruned.train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(pruned(x), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in pruned.parameters())


def test_gradients_of_the_input_are_exact_too():
    model = wrapped_with(Residual(), MASKS, bias=True)
    pruned = prifu.prune(model, torch.zeros(SHAPES[0]))
    grads = []
    for net in (model, pruned):
        x = torch.ones(SHAPES[0], dtype=torch.float64, requires_grad=True)
        net(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


def test_plans_and_reports_of_a_later_version_are_refused():
    pruned = prifu.prune(wrapped_with(Residual(), MASKS), torch.zeros(SHAPES[0]))
    text = prifu.plan(pruned).to_json()
    assert '"format": 1' in text
    with pytest.raises(ConfigError, match="plan has format 99.*Upgrade"):
        prifu.Plan.from_json(text.replace('"format": 1', '"format": 99'))
    data = prifu.report(pruned).to_dict()
    with pytest.raises(ConfigError, match="report of prune has format 2"):
        prifu.PruneReport.from_dict(data | {"format": 2})


def test_branches_that_start_at_zero_are_named():
    net = wrapped_with(Residual(), {})
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    norm.weight.data.zero_()
    notes = prifu.report(prifu.prune(net, torch.zeros(SHAPES[0]))).notes
    assert [why for _, why in notes if "own scale is 0" in why]


def test_plain_attributes_and_the_memory_format_stay():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
    net.num_classes, net.pretrained_cfg, net.owner = 2, {"mean": (0.5, 0.5, 0.5)}, object()
    model = prifu.wrap(net).to(memory_format=torch.channels_last).eval()
    prifu.filters(model)["1"].weight.data[:3] = 0
    pruned = prifu.prune(model, torch.zeros(1, 3, 8, 8))
    again = prifu.rebuild(net, prifu.plan(pruned), pruned.state_dict())
    for one in (pruned, copy.deepcopy(pruned), again):
        assert (one.num_classes, one.pretrained_cfg) == (2, {"mean": (0.5, 0.5, 0.5)})
        assert not hasattr(one, "owner")  # others need not know its class
    kernel = pruned.get_submodule("0").weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()


class InParts(nn.Module):
    """Decides on values, so that only its parts are pruned."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        y = self.part(x)
        return y if float(y.detach().mean()) < 1e9 else -y


@pytest.mark.parametrize("kind", ["before", "behind"])
@pytest.mark.parametrize("net", [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), InParts()])
def test_a_hook_of_the_model_itself_that_changes_something_is_refused(net, kind):
    model = prifu.wrap(net).eval()
    if kind == "before":
        model.register_forward_pre_hook(lambda module, args: ((args[0] - 0.5) / 0.25,))
    else:
        model.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(VerificationError, match="hook of the model itself off"):
        prifu.prune(model, torch.rand(2, 3, 8, 8))


def test_a_filter_that_was_lost_with_its_layer_is_missed():
    model = prifu.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    model[1] = nn.BatchNorm2d(4)
    with pytest.raises(OrderError, match="The filter at '1' is gone"):
        prifu.prune(model, torch.rand(2, 3, 8, 8))


def test_a_plan_is_of_the_arguments_that_its_model_was_built_with():
    class Net(nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 2)
            self.attention = nn.MultiheadAttention(16, heads, batch_first=True)

        def forward(self, x):
            x = self.norm(x)
            return self.head(self.attention(x, x, x)[0].mean(1))

    pruned = prifu.prune(prifu.wrap(Net(2)).eval(), torch.randn(2, 5, 16))
    plan, weights = prifu.plan(pruned).to_json(), pruned.state_dict()
    x = torch.randn(2, 5, 16)
    assert torch.equal(prifu.rebuild(Net(2), plan, weights)(x), pruned(x))
    with pytest.raises(NoSiteError, match="same arguments"):
        prifu.rebuild(Net(8), plan, weights)


def test_examples_without_values_are_refused():
    model = prifu.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    with pytest.raises(ConfigError, match="on the meta device"):
        prifu.prune(model, torch.rand(2, 3, 8, 8, device="meta"))
