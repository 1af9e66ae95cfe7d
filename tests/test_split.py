import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import CaptureError, ConfigError, NoSiteError, PrifuWarning
from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.prune.verify import difference
from prifu_plugin.split import Split

CUTS = [
    ("test_resnet", 64, "layer2"),
    ("test_resnet", 64, "global_pool"),
    ("test_resnet", 64, "layer1.0"),
    ("test_efficientnet", 64, "blocks.1"),
    ("test_vit", 160, "blocks.2"),
    ("test_vit", 160, "pos_drop"),
    ("convnext_atto", 64, "stages.1"),
    pytest.param(
        "densenet121", 64, "features.denseblock2", marks=[pytest.mark.slow, pytest.mark.long]
    ),
    pytest.param("swin_tiny_patch4_window7_224", 224, "layers.1", marks=pytest.mark.slow),
]


def half(model):
    for unit in prifu.filters(model).values():
        unit.weight.data[::2] = 0.0
    return model.eval()


@pytest.mark.parametrize(("name", "size", "at"), CUTS)
def test_parts_compose(name, size, at):
    torch.manual_seed(0)
    x = torch.randn(3, 3, size, size)
    plain = timm.create_model(name, num_classes=4).eval()
    wrapped = half(prifu.wrap(plain))
    pruned = prifu.prune(wrapped, x) if size == 64 else None
    for model in (plain, wrapped, pruned):
        if model is None:
            continue
        parts = prifu.split(model, at, x)
        edge, cloud = parts
        assert isinstance(parts, Split)
        assert torch.equal(cloud(edge(x)), model(x))
        assert torch.equal(cloud(edge(x[:1])), model(x[:1]))


def test_it_is_the_output_of_the_module():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    seen = []
    model.layer2.register_forward_hook(lambda m, i, o: seen.append(o))
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    edge, cloud = prifu.split(model, "layer2", x)
    assert torch.equal(edge(x), seen[0])
    assert torch.equal(cloud(seen[0]), expected)


def test_the_modules_are_the_models_own():
    model = prifu.wrap(timm.create_model("test_resnet", num_classes=3))
    edge, cloud = prifu.split(model, "layer2", torch.zeros(2, 3, 64, 64))
    own = {id(p) for p in model.parameters()}
    parts = {id(p) for part in (edge, cloud) for p in part.parameters()}
    assert parts <= own
    assert len(prifu.filters(edge)) + len(prifu.filters(cloud)) == len(prifu.filters(model))


def test_a_filter_on_the_cut_is_on_the_edge():
    x = torch.randn(4, 3, 64, 64)
    model = prifu.wrap(timm.create_model("test_resnet", num_classes=3), cut="layer2").eval()
    prifu.filters(model)["layer2"].weight.data[:10] = 0.0
    parts = prifu.split(model, "layer2", x)
    payload = parts.payload(x)
    width = len(prifu.filters(model)["layer2"].weight)
    assert payload.shape[0] == width
    assert not payload.varying[:10].any()
    z = parts.edge(x)
    spread = (z.amax((0, 2, 3)) - z.amin((0, 2, 3))).ne(0)
    differs = (z.amax(0) - z.amin(0)).amax((1, 2)).ne(0)
    assert torch.equal(payload.varying, differs)
    assert differs[10:].sum() > len(differs[10:]) / 2
    assert not (differs & ~spread).any()
    assert payload.bytes == 4 * width * payload.shape[1] * payload.shape[2]


def test_a_residual_stream_is_named():
    model = torchvision.models.resnet18(num_classes=3)
    x = torch.zeros(2, 3, 64, 64)
    with pytest.raises(ConfigError, match="past 'layer1_0_conv1'.*Cut at") as error:
        prifu.split(model, "layer1.0.conv1", x)
    assert "several=True" in str(error.value)
    edge, cloud = prifu.split(model, "layer1.0.conv1", x, several=True)
    upload = edge.eval()(x)
    assert len(upload) == 2
    assert torch.equal(cloud(upload), model.eval()(x))


def test_tokens_that_go_around():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x).relu()
            return self.b(h).reshape(x.shape[0], x.shape[1] * 4)

    model, x = Around(), torch.randn(3, 5, 4)
    edge, cloud = prifu.split(model, "a", x)
    for shape in ((3, 5, 4), (2, 7, 4)):
        x = torch.randn(shape)
        assert torch.equal(cloud(edge(x)), model(x))


@pytest.mark.parametrize("cut", [True, False])
def test_the_channels_of_tokens_that_vary(cut):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=2)
    x = torch.randn(4, 3, 160, 160)
    if cut:
        model = prifu.wrap(model, cut="blocks.2", example_inputs=x, preserve=False).eval()
        unit = model.get_submodule("blocks.2").prifu.prifu
        unit.weight.data[:20] = 0.0
        unit.weight.data[20:] = 0.1
        varying = prifu.split(model, "blocks.2", x).payload(x).varying
        assert torch.equal(varying, unit.open)
    else:
        varying = prifu.split(model.eval(), "blocks.2", x).payload(x).varying
        assert varying.shape == (64,)
        assert prifu.split(model, "blocks.2", x).payload(x, dim=1).varying.shape == (101,)


def test_modes_stay_and_uploads_survive():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)
    model = nn.Sequential(*layers).train()
    x = torch.randn(2, 3, 8, 8)
    edge, cloud = prifu.split(model, "1", x)
    assert all(module.training for module in [*model.modules(), *edge.modules()])
    model.eval()
    z = edge.eval()(x)
    before = z.clone()
    assert torch.equal(cloud.eval()(z), model(x))
    assert torch.equal(z, before)


def test_an_input_that_comes_late():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y):
            return self.b(self.a(x) + y)

    x = torch.zeros(2, 4)
    with pytest.raises(ConfigError, match="input 'y' is used behind the cut"):
        prifu.split(Late(), "a", (x, x))


def test_every_cut_point_composes():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    places = prifu.cut_points(model, x)
    assert len(places) == 20
    for name in places:
        edge, cloud = prifu.split(model, name, x)
        assert torch.equal(cloud(edge(x)), model(x)), name


def test_a_wrong_place():
    model = timm.create_model("test_resnet")
    with pytest.raises(NoSiteError, match="Closest: layer"):
        prifu.split(model, "layer9")
    with pytest.raises(ConfigError, match="shape of Sequential is unknown"):
        prifu.split(nn.Sequential(nn.Linear(2, 2)), "0")
    with pytest.raises(ConfigError, match="refuses"):
        prifu.split(model, "layer2", torch.zeros(2, 5, 8, 8))


class Deciding(nn.Module):
    """Branches on sizes, throws something away, and returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.body = Padding()
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x, **settings):
        return {"out": self.head(self.body(self.stem(x)))}


class Padding(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        if x.shape[-1] % 4:
            x = nn.functional.pad(x, (0, 4 - x.shape[-1] % 4))
        y = x + self.norm(self.conv(x))
        y.mean().exp()  # nobody reads it
        return y


def test_a_model_that_decides_on_sizes_is_cut_under_guards():
    torch.manual_seed(0)
    plain = Deciding().eval()
    wrapped = prifu.wrap(plain)
    for unit in prifu.filters(wrapped).values():
        unit.weight.data[::2] = 0.0
    x = torch.randn(2, 3, 6, 6)
    for model in (plain, wrapped, prifu.prune(wrapped, x)):
        parts = prifu.split(model, "body", x)
        for batch in (1, 2, 5):
            x = torch.randn(batch, 3, 6, 6)
            z = parts.edge(x)
            assert z.shape[-1] == 8
            torch.testing.assert_close(parts.cloud(z)["out"], model(x)["out"], rtol=0, atol=0)
        with pytest.raises(AssertionError, match="split for other input sizes"):
            parts.edge(torch.randn(2, 3, 6, 9))


@pytest.mark.parametrize("how", ["as it is", "copied", "rebuilt"])
def test_a_pruned_model_is_cut_where_its_modules_ended(how):
    wrapped = prifu.wrap(timm.create_model("test_resnet")).eval()
    for unit in prifu.filters(wrapped).values():
        unit.weight.data[1::2] = 0.0
    x = torch.randn(2, 3, 64, 64)
    pruned = prifu.prune(wrapped, x)
    if how == "copied":
        pruned = copy.deepcopy(pruned)
    if how == "rebuilt":
        fresh, weights = timm.create_model("test_resnet"), pruned.state_dict()
        pruned = prifu.rebuild(fresh, prifu.plan(pruned), weights)
    for at in ("layer2", "layer3.0", "bn1"):
        edge, cloud = prifu.split(pruned, at, x)
        z, whole = edge(x), prifu.split(wrapped, at, x).edge(x)
        torch.testing.assert_close(cloud(z), pruned(x), rtol=0, atol=0)
        apart = (z[:, :, None] - whole[:, None]).abs().amax((0, 3, 4)).amin(1)
        assert apart.max() <= 1e-5  # each channel is one of the original's


class Statements(nn.Module):
    """Overwrites a tensor in a statement, whose result nobody takes."""

    def __init__(self, overwrite):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.overwrite = overwrite

    def forward(self, x):
        x = self.a(x)
        self.overwrite(x)
        return self.c(self.b(x))


@pytest.mark.parametrize(
    "overwrite",
    [lambda x: F.relu(x, inplace=True), lambda x: x.clamp_(0), torch.relu_, lambda x: x.mul_(3.0)],
    ids=["relu", "clamp_", "relu_", "mul_"],
)
@pytest.mark.parametrize("several", [False, True])
def test_statements_in_place_are_on_the_side_of_what_they_change(overwrite, several):
    model, x = Statements(overwrite).eval(), torch.randn(5, 4)
    edge, cloud = prifu.split(model, "b", x, several=several)
    assert torch.equal(cloud(edge(x)), model(x))


def test_statements_on_a_view_of_what_is_read_later_are_refused():
    model = Statements(lambda x: x.view(-1).relu_()).eval()
    with pytest.raises(CaptureError, match="shares memory"):
        prifu.split(model, "b", torch.randn(5, 4))


class Late(Statements):
    def forward(self, x):
        x = self.a(x)
        y = self.b(x)
        return self.c(x.mul_(2) + y)


def test_a_cloud_leaves_each_of_several_uploads_as_it_was():
    model, x = Late(None).eval(), torch.randn(5, 4)
    edge, cloud = prifu.split(model, "b", x, several=True)
    upload = edge(x)
    assert torch.equal(cloud(upload), cloud(upload))
    assert torch.equal(cloud(upload), model(x))


class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        x = self.a(x)
        if isinstance(x, torch.Tensor):
            x = x * 2
        (self.b(x) * 2).sum()  # nobody reads it
        last, _ = self.rnn(x[:, None])
        return self.b(last[:, 0])


def test_what_nobody_reads_does_not_cross():
    model, x = Looking().eval(), torch.randn(5, 4)
    points = prifu.cut_points(model, x)
    assert "a" in points
    assert "mul" in points
    for name in points:
        edge, cloud = prifu.split(model, name, x)
        assert torch.equal(cloud(edge(x)), model(x)), name


class Aliased(Looking):
    def forward(self, x):
        x = self.a(x)
        self.drop(x).relu_()
        return self.b(x)


@pytest.mark.parametrize("how", ["alias", "before", "behind"])
def test_parts_that_compute_something_else_are_refused(how):
    torch.manual_seed(0)
    model, x = (Aliased() if how == "alias" else Looking()).eval(), torch.randn(5, 4)
    if how == "before":
        model.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    if how == "behind":
        model.register_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(CaptureError, match="compute something else|shares memory"):
        prifu.split(model, "a", x)


class Parted(Looking):
    def forward(self, x, y):
        first, second = self.a(x).chunk(2, 1)
        return self.b(torch.cat([first * second, first], 1)) + y


def test_cut_points_are_places_that_split_takes():
    inputs = torch.randn(5, 4), torch.randn(5, 4)
    assert prifu.cut_points(Parted().eval(), inputs) == []


def test_the_statistics_of_a_model_in_training_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).train()
    with undisturbed(model):
        model(torch.randn(4, 3, 5, 5))
    prifu.split(model, "2", torch.randn(4, 3, 5, 5))
    prifu.cut_points(model, torch.randn(4, 3, 5, 5))
    assert model.training
    assert not model[1].running_mean.any()
    assert model[1].num_batches_tracked == 0


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        late = torch.rand_like(x)  # drawn first, for the cloud
        x = self.a(x + torch.rand_like(x))
        return self.b(x) + late[:, :2]


def test_random_draws_may_change_their_order():
    model, x = Noisy().eval(), torch.randn(5, 4)
    edge, cloud = prifu.split(model, "a", x, several=True)
    assert cloud(edge(x)).shape == (5, 2)


def test_parts_of_a_model_without_finite_outputs_were_not_compared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.constant_(model[1].bias, float("nan"))
    with pytest.warns(PrifuWarning, match="nothing was compared"):
        prifu.split(model, "0", torch.randn(5, 4))


class Single(nn.Module):
    """Takes one image at a time, and its cloud asks for sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        y = self.a(x).view(1, 4, 36).mean(2)
        return self.b(y) * x.shape[2]


def test_a_model_that_takes_one_input_only_is_cut_for_its_size():
    model, x = Single().eval(), torch.randn(1, 3, 8, 8)
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.randn(2, 3, 8, 8))
    edge, cloud = prifu.split(model, "a", x)
    torch.testing.assert_close(cloud(edge(x)), model(x))
    with pytest.raises(AssertionError, match="other input sizes"):
        edge(torch.randn(2, 3, 8, 8))


def test_an_input_that_a_model_refuses_is_said_with_its_reason():
    with pytest.raises(ConfigError, match="refuses inputs.*mat1"):
        prifu.split(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "0", torch.randn(5, 3))


def test_complex_outputs_are_compared_with_their_imaginary_parts():
    a = torch.tensor([1 + 2j, 3 + 1j])
    assert difference(a, a.real + 0j) > 0.1
    assert difference(a, a) == 0
    assert difference(a, torch.view_as_real(a)) == float("inf")


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.ReLU()
        self.wide, self.head = nn.Linear(4, 7), nn.Linear(7, 2)

    def forward(self, x):
        tokens = self.act(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head(self.wide(tokens).mean(1))


def test_the_channels_of_an_upload_behind_another_filter():
    x = torch.randn(4, 3, 16, 16)
    model = prifu.wrap(Tokens(), cut="act", noise=0.3, example_inputs=x).eval()
    assert prifu.split(model, "wide", x).payload(x).varying.shape == (7,)
    at_filter = prifu.split(model, "act", x)
    assert at_filter.filtered_dim == 1
    assert at_filter.payload(x).varying.shape == (4,)


def test_an_edge_that_decides_on_sizes_says_how_to_split_again():
    class Even(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y + 1 if x.shape[-1] % 2 == 0 else y)

    parts = prifu.split(Even().eval(), "conv", torch.randn(2, 3, 8, 8))
    with pytest.raises(AssertionError, match="Split again"):
        parts.edge(torch.randn(2, 3, 9, 9))


def cut_net():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Identity(), nn.Linear(8, 2))
    return prifu.wrap(net, cut="3", noise=0.3, example_inputs=torch.zeros(2, 3, 8, 8)).eval()


@pytest.mark.parametrize("prunes", [False, True])
def test_a_cut_in_front_of_the_filter_on_the_upload_is_warned_of(prunes):
    x = torch.rand(4, 3, 8, 8)
    model = prifu.prune(cut_net(), x) if prunes else cut_net()
    with pytest.warns(PrifuWarning, match="at '3', is behind the cut at '_2'.*Cut at '3'"):
        prifu.split(model, "2", x)
    for at in ("3", "4"):
        prifu.split(model, at, x)


def test_dropout_that_the_parts_of_a_model_in_training_lack_is_warned_of():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(nn.functional.dropout(self.norm(x), 0.5, self.training))

    with pytest.warns(PrifuWarning, match="'dropout' is functional dropout"):
        prifu.split(Net().train(), "norm", torch.rand(4, 4))
    prifu.split(Net().eval(), "norm", torch.rand(4, 4))


def test_a_model_of_fixed_size_is_cut_without_a_word(capsys):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 16, 8))
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.norm(x.flatten(2).transpose(1, 2) + self.position).mean(1))

    x = torch.rand(4, 8, 4, 4)
    pruned = prifu.prune(prifu.wrap(Net()).eval(), x)
    prifu.split(pruned, "norm", x)
    assert capsys.readouterr().err == ""


class Last(nn.Module):
    """Gives what has its channels last."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 2)
        self.end = nn.Identity()

    def forward(self, x):
        return self.head(self.end(self.norm(self.conv(x).permute(0, 2, 3, 1))).mean((1, 2)))


def test_the_channels_of_a_pruned_models_upload_are_where_the_filter_was():
    x = torch.randn(2, 3, 5, 5)
    wrapped = prifu.wrap(Last(), cut="end", cut_dim=-1, example_inputs=x).eval()
    wrapped.end.prifu.prifu.weight.data[:3] = 0.0
    for model in (wrapped, prifu.prune(wrapped, x)):
        payload = prifu.split(model, "end", x).payload(x)
        assert int(payload.varying.sum()) == 5
