"""What is said to a user who passes something else: what, where, and what to pass instead."""

import pytest
import timm
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import prifu_plugin as prifu
from prifu_plugin import baselines, channel
from prifu_plugin.audit.over_seeds import over_seeds
from prifu_plugin.errors import (
    ConfigError,
    NoSiteError,
    OrderError,
    PrifuWarning,
    VerificationError,
)
from prifu_plugin.keyed import KeyedNoise

IMAGES = torch.rand(2, 3, 16, 16)
TARGETS = torch.tensor([0, 1])


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def on_meta():
    return prifu.wrap(network().to("meta"))


WITHOUT_VALUES = {
    "status": lambda m: prifu.status(m),
    "summary": lambda m: prifu.summary(m),
    "history": lambda m: prifu.MaskHistory(m),
    "sweep": lambda m: prifu.sweep(m, [(IMAGES, TARGETS)], [0.0]),
    "fit_alpha": lambda m: prifu.fit_alpha(m, [(IMAGES, TARGETS)], keep=0.5),
    "absorb": lambda m: prifu.absorb(m),
    "relevance": lambda m: prifu.relevance(m, [(IMAGES, TARGETS)]),
    "influence": lambda m: prifu.influence(m, IMAGES, TARGETS),
    "recalibrate": lambda m: prifu.recalibrate(m, [IMAGES]),
    "split": lambda m: prifu.split(m, "2", IMAGES),
    "cut_points": lambda m: prifu.cut_points(m, IMAGES),
    "prune": lambda m: prifu.prune(m, IMAGES),
}


@pytest.mark.parametrize("what", WITHOUT_VALUES)
def test_weights_without_values_are_named(what):
    with pytest.raises(OrderError, match="on the meta device"):
        WITHOUT_VALUES[what](on_meta())


def test_a_model_without_values_can_be_printed():
    assert "? open" in repr(on_meta())


@pytest.mark.parametrize("ask", [prifu.cut_points, lambda m, x: prifu.split(m, "2", x)])
def test_a_compiled_model_is_not_split(ask):
    compiled = torch.compile(network().eval(), backend="eager")
    with pytest.raises(OrderError, match="_orig_mod"):
        ask(compiled, IMAGES)


def test_a_cut_that_is_no_module():
    model = timm.create_model("test_vit")
    x = torch.zeros(1, 3, 160, 160)
    with pytest.raises(NoSiteError, match=r"cut_points\(model\)") as caught:
        prifu.wrap(model, cut="global_pool", example_inputs=x)
    assert "norm" not in str(caught.value).partition("Closest: ")[2].partition(".")[0]
    with pytest.raises(NoSiteError, match=r"cut_points\(model\)"):
        prifu.wrap(model, cut="", example_inputs=x)


class Choosing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x, mask=None, *, features=False, **settings):
        return self.body(x)


def test_inputs_by_name_are_remembered():
    wrapped = prifu.wrap(network()).eval()
    wrapped(input=IMAGES)
    pruned = prifu.prune(wrapped)
    assert prifu.report(pruned).checks[-1].shapes == ((2, 3, 16, 16),)
    plain = prifu.unwrap(wrapped)
    assert not plain._forward_pre_hooks
    assert not plain._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize(
    "settings", [{}, {"mask": None}, {"features": True}, {"other": 3}, {"mask": None, "other": "a"}]
)
@pytest.mark.parametrize("name", ["", "x"])
def test_settings_by_name_hide_no_inputs(settings, name):
    wrapped = prifu.wrap(Choosing()).eval()
    given = {name: IMAGES, **settings} if name else settings
    wrapped(*(() if name else (IMAGES,)), **given)
    assert prifu.report(prifu.prune(wrapped)).checks[-1].shapes == ((2, 3, 16, 16),)


def test_a_hook_of_before_inputs_had_names_runs():
    wrapped = prifu.wrap(network())
    wrapped._forward_pre_hooks_with_kwargs.clear()  # as in a pickle of then
    wrapped(IMAGES)


def test_filters_have_values_where_the_head_has_none_yet():
    wrapped = prifu.wrap(nn.Sequential(*network(), nn.LazyLinear(2)))
    assert prifu.status(wrapped)["open share"] == 1.0
    assert "4 of 4 channels open" in str(prifu.summary(wrapped))
    assert prifu.MaskHistory(wrapped).record(0)["open"] == 4
    prifu.recalibrate(wrapped, [IMAGES])
    wrapped[-1].to("meta")
    assert prifu.status(wrapped)["open share"] == 1.0


def test_a_key_that_is_too_short_is_said_to_be():
    wrapped = prifu.wrap(network(), cut="2", noise=0.1, example_inputs=IMAGES).eval()
    wrapped[2].prifu.key = b"short"
    with pytest.raises(ConfigError, match="^key must be 16 to 64 random bytes"):
        prifu.prune(wrapped, IMAGES)


class Typed(nn.Module):
    """Asks for the type of what it is given."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return self.body(x) * (2.0 if x.dtype == torch.float32 else 5.0)


def test_a_forward_that_is_another_one_in_fp64_is_named():
    with pytest.raises(VerificationError, match="asks a tensor for its dtype"):
        prifu.prune(prifu.wrap(Typed()).eval(), IMAGES)


def test_a_dictionary_among_inputs_is_named():
    with pytest.raises(ConfigError, match="example_inputs holds a dict"):
        prifu.prune(prifu.wrap(network()), ({"image": IMAGES},))




SAID = {
    "a build without a function": (
        lambda: prifu.fastest(prifu.wrap(network()).eval(), IMAGES, build=lambda m: None),
        "build returns a NoneType",
    ),
    "no reports": (lambda: over_seeds(3), "reports is a int"),
    "images of two channels": (
        lambda: channel.image_bytes(torch.rand(2, 2, 8, 8)),
        r"pass \(N, 3, H, W\)",
    ),
    "one image": (lambda: channel.image_bytes(torch.rand(3, 8, 8)), r"pass \(N, 3, H, W\)"),
    "relevance of other channels": (
        lambda: baselines.keep_channels(nn.Identity(), torch.rand(64), 10)(torch.rand(2, 96)),
        "64 channels",
    ),
    "a strength in words": (
        lambda: baselines.CI(nn.Flatten(), nn.Linear(4, 2), strength="high"),
        "strength='high'",
    ),
}


@pytest.mark.parametrize("what", SAID)
def test_what_does_not_fit_is_said(what):
    ask, words = SAID[what]
    with pytest.raises(ConfigError, match=words):
        ask()


def test_grey_images_have_a_size():
    assert channel.image_bytes(torch.rand(2, 1, 8, 8))["raw"] == 64


def test_a_server_whose_quantizer_has_no_range():
    with pytest.raises(ConfigError, match="load the state of the one"):
        channel.Channel(channel.Quantizer(4)).decode(b"\0" * 8, (1, 16))


def test_noise_with_a_key_is_in_no_graph():
    noise = KeyedNoise(b"k" * 32, 0.3).eval()
    with pytest.raises(ConfigError, match="one fixed draw"):
        make_fx(noise)(torch.randn(2, 8))


def resnet(act, memory=torch.contiguous_format):
    model = timm.create_model("resnetv2_50", act_layer=act, num_classes=2, layers=(1, 1, 1, 1),
                              channels=(16, 32, 32, 64), stem_chs=16)  # fmt: skip
    return model.to(memory_format=memory).eval()


def test_another_activation_inside_a_norm_is_another_network():
    x = torch.randn(2, 3, 64, 64)
    pruned = prifu.prune(prifu.wrap(resnet(nn.ReLU)).eval(), x)
    plan, weights = prifu.plan(pruned).to_json(), pruned.state_dict()
    assert torch.equal(prifu.rebuild(resnet(nn.ReLU), plan, weights)(x), pruned(x))
    with pytest.raises(NoSiteError):
        prifu.rebuild(resnet(nn.SiLU), plan, weights)


def test_the_memory_format_is_made_again():
    x = torch.randn(2, 3, 64, 64)
    model = resnet(nn.ReLU, torch.channels_last)
    pruned = prifu.prune(prifu.wrap(model).eval(), x)
    weights = {name: value.contiguous() for name, value in pruned.state_dict().items()}
    again = prifu.rebuild(resnet(nn.ReLU, torch.channels_last), prifu.plan(pruned), weights)
    for one, other in zip(pruned.parameters(), again.parameters(), strict=True):
        assert one.stride() == other.stride()
    assert torch.equal(again(x), pruned(x))


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.act, self.head = nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x):
        y = self.first(x)
        return self.head(y + self.act(self.norm(y)))


@pytest.mark.parametrize("pruned", [False, True])
def test_what_goes_around_the_filter_on_the_upload_is_named(pruned):
    x = torch.randn(4, 6)
    model = prifu.wrap(Around(), cut="act", noise=0.3, example_inputs=x).eval()
    model = prifu.prune(model, x) if pruned else model
    with pytest.warns(PrifuWarning, match="first is uploaded as it is"):
        prifu.split(model, "act", x, several=True)
