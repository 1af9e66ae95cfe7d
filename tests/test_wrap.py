import collections
import copy
import io
import pickle

import pytest
import timm
import timm.layers.grn
import torch
import torch.nn.functional as F
import zoo
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.config import FilterConfig
from prifu_plugin.cut import CutFilter
from prifu_plugin.errors import ConfigError, NoSiteError, OrderError, PrifuWarning
from prifu_plugin.graph.host import attach
from prifu_plugin.graph.undisturbed import undisturbed


@pytest.fixture(params=zoo.SMALL)
def case(request):
    model = zoo.build(request.param).eval()
    size = 160 if request.param == "test_vit" else 64
    return model, prifu.wrap(model), torch.randn(2, 3, size, size)


def test_every_norm_gets_a_filter_and_the_function_is_preserved(case):
    model, wrapped, x = case
    torch.testing.assert_close(wrapped(x), model(x), rtol=1e-4, atol=1e-5)
    listed = prifu.sites(wrapped)
    assert all(site.filtered and site.reached == "graph" for site in listed)
    assert len(listed) == len(prifu.filters(wrapped)) == len(prifu.summary(wrapped).rows) > 0


def test_class_attributes_and_names_stay(case):
    model, wrapped, _ = case
    assert type(wrapped) is type(model)
    assert [type(m).__name__ for m in unfiltered(wrapped)] == [
        type(m).__name__ for m in model.modules()
    ]
    for ours, theirs in zip(unfiltered(wrapped), model.modules(), strict=True):
        assert isinstance(ours, type(theirs))
    own = {key for key in wrapped.state_dict() if ".prifu." not in key}
    assert own == set(model.state_dict())


def unfiltered(model):
    return [m for m in model.modules() if not isinstance(m, prifu.PriFU)]


def test_checkpoints(case):
    model, wrapped, x = case
    fresh = prifu.wrap(copy.deepcopy(model))
    for unit in prifu.filters(fresh).values():
        unit.weight.data.uniform_(0, 1)
    wrapped.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(wrapped(x), fresh(x))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(wrapped(x), fresh(x))
    broken = dict(wrapped.state_dict())
    del broken[next(key for key in broken if key.endswith("prifu.weight"))]
    with pytest.raises(RuntimeError, match="prifu.weight"):
        wrapped.load_state_dict(broken)
    restored = prifu.unwrap(wrapped)
    restored.load_state_dict(model.state_dict())
    assert torch.equal(restored(x), model(x))
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
    assert not restored._forward_pre_hooks


def test_copies_pickles_and_averages(case):
    _, wrapped, x = case
    close_first(wrapped)
    expected = wrapped(x)
    buffer = io.BytesIO()
    torch.save(wrapped, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(wrapped),
        pickle.loads(pickle.dumps(wrapped)),
        torch.load(buffer, weights_only=False),
        ModelEmaV3(wrapped).module,
        torch.optim.swa_utils.AveragedModel(wrapped).module,
    ]
    for twin in twins:
        assert torch.equal(twin(x), expected)
        assert prifu.summary(twin).open == prifu.summary(wrapped).open
    twins[0](x).sum().backward()
    assert all(unit.weight.grad is None for unit in prifu.filters(wrapped).values())


def close_first(model):
    for unit in prifu.filters(model).values():
        unit.weight.data[0] = 0.0


def test_sync_batchnorm_keeps_the_filters(case):
    _, wrapped, x = case
    close_first(wrapped)
    expected = wrapped(x)
    converted = convert_sync_batchnorm(copy.deepcopy(wrapped)).eval()
    torch.testing.assert_close(converted(x), expected)
    assert prifu.summary(converted).open == prifu.summary(wrapped).open


def test_torchs_own_sync_batchnorm_conversion():
    net = prifu.wrap(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    close_first(net)
    x = torch.randn(2, 3, 4, 4)
    expected = net(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert isinstance(converted[1], nn.SyncBatchNorm)
    torch.testing.assert_close(converted(x), expected)


def test_every_entry_point_is_filtered():
    model = prifu.wrap(timm.create_model("test_resnet", num_classes=10)).eval()
    for unit in prifu.filters(model).values():
        unit.weight.data.zero_()
    x = torch.randn(1, 3, 64, 64)
    assert model.forward_features(x).abs().max() == 0
    assert all(f.abs().max() == 0 for f in model.forward_intermediates(x, intermediates_only=True))
    model.reset_classifier(3)
    assert model(x).shape == (1, 3)
    assert model.get_classifier().out_features == 3
    model.set_grad_checkpointing(True)
    assert "bn1.prifu.weight" in dict(model.named_parameters())


def test_gradients_reach_every_filter_and_equal_a_separate_product(case):
    model, wrapped, x = case
    wrapped, plain = wrapped.double(), model.double()
    x = x.double()
    handles = []
    weights = {}
    for path, unit in prifu.filters(wrapped).items():
        dims = [1] * 4 if unit.dim == 1 else [1] * 3
        dims[unit.dim] = -1
        if hasattr(plain.get_submodule(path), "act"):
            return  # a fused activation stands between
        weights[path] = unit.weight.detach().clone().requires_grad_()
        scale = weights[path].reshape(dims) * 10
        module = plain.get_submodule(path)
        handles.append(module.register_forward_hook(lambda m, i, o, s=scale: o * s))
    wrapped(x).square().sum().backward()
    plain(x).square().sum().backward()
    for path, unit in prifu.filters(wrapped).items():
        torch.testing.assert_close(unit.weight.grad, weights[path].grad, rtol=1e-7, atol=1e-9)


def test_the_filter_stands_before_a_fused_activation():
    from timm.layers import BatchNormAct2d

    net = prifu.wrap(nn.Sequential(BatchNormAct2d(2, act_layer=nn.SiLU)), preserve=False).eval()
    x = torch.randn(2, 2, 3, 3)
    expected = nn.functional.silu(0.1 * x / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (3, 4)), (nn.BatchNorm2d(4, affine=False), (3, 4, 2, 2)),
        (nn.BatchNorm3d(4), (2, 4, 2, 2, 2)), (nn.GroupNorm(2, 4), (2, 4, 3)),
        (nn.InstanceNorm2d(4), (2, 4, 3, 3)), (nn.LayerNorm(4), (2, 3, 4)),
        (nn.RMSNorm(4), (2, 3, 4)), (nn.LayerNorm((4, 3, 3)), (2, 4, 3, 3)),
        (timm.layers.LayerNorm2d(4), (2, 4, 3, 3)), (timm.layers.RmsNorm(4), (2, 3, 4)),
        (timm.layers.GroupNorm1(4), (2, 4, 3, 3)), (timm.layers.EvoNorm2dS0(4, 2), (2, 4, 3, 3)),
        (timm.layers.EvoNorm2dB0(4), (2, 4, 3, 3)), (timm.layers.SimpleNorm(4), (2, 3, 4)),
        (timm.layers.FilterResponseNormAct2d(4), (2, 4, 3, 3)),
        (timm.layers.grn.GlobalResponseNorm(4), (2, 3, 3, 4)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_of_norm(norm, shape, bias):
    net = prifu.wrap(nn.Sequential(norm), bias=bias)
    unit = prifu.filters(net)["0"]
    x = torch.randn(shape)
    torch.testing.assert_close(net(x), norm(x))
    unit.weight.data[1] = 0.0
    if bias:
        unit.bias.data[1] = 0.5
    channel = net(x).movedim(unit.dim, 0)[1]
    torch.testing.assert_close(channel, torch.full_like(channel, channel.flatten()[0].item()))
    net(x).square().sum().backward()
    assert torch.isfinite(unit.weight.grad).all()


def test_shared_norms_get_one_filter():
    norm = nn.BatchNorm1d(4)
    net = prifu.wrap(nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm))
    assert list(prifu.filters(net)) == ["1"]


def test_weight_standardization_is_no_norm():
    model = timm.create_model("resnetv2_50d_gn", num_classes=2)
    assert {site.type for site in prifu.sites(model)} == {"GroupNormAct"}


class Functional(nn.Module):
    """Two functional norms in one forward, one of them in training only; weight standardization."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.rand(4))

    def forward(self, x, scale: float = 1.0):
        weight = nn.functional.layer_norm(self.second.weight, (4,))
        x = nn.functional.layer_norm(self.first(x) * scale, (4,), self.gamma)
        if self.training:
            x = nn.functional.rms_norm(x, (4,))
        return nn.functional.linear(x, weight)


@pytest.mark.parametrize("nested", [False, True])
def test_functional_norms(nested):
    net = nn.Sequential(Functional(), nn.ReLU()) if nested else Functional()
    x = torch.randn(5, 3)
    wrapped = prifu.wrap(net)
    prefix = "0." if nested else ""
    assert set(prifu.filters(wrapped)) == {f"{prefix}layer_norm_1", f"{prefix}rms_norm"}
    assert all(s.filtered and s.reached == "functional" for s in prifu.sites(wrapped))
    assert type(wrapped) is type(net) or isinstance(wrapped, Functional)
    for mode in (True, False):
        torch.testing.assert_close(wrapped.train(mode)(x), net.train(mode)(x))
    close_first(wrapped)
    expected = wrapped(x)
    assert not torch.equal(expected, net(x))
    wrapped.load_state_dict(net.state_dict())
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(twin(x), expected)
    torch.testing.assert_close(torch.compile(wrapped, fullgraph=True, backend="eager")(x), expected)
    pruned = prifu.prune(wrapped, x)
    torch.testing.assert_close(pruned(x), expected)
    assert "layer_norm_1" in str(prifu.summary(wrapped))
    assert torch.equal(prifu.unwrap(wrapped)(x), net(x))


def test_functional_norms_that_cannot_be_filtered_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return nn.functional.group_norm(self.norm(x), 2)

    refused = [site for site in prifu.sites(Net()) if site.refused]
    assert [(site.path, site.reached) for site in refused] == [("group_norm", "functional")]
    with pytest.warns(PrifuWarning, match="group_norm.*number of channels"):
        prifu.wrap(Net())


def test_listing_sites_leaves_no_trace():
    model = zoo.build("swin_tiny_patch4_window7_224")
    before = set(model.__dict__)
    prifu.sites(model)
    assert set(model.__dict__) == before


def test_include_and_exclude():
    model = zoo.build("test_resnet")
    chosen = prifu.filters(prifu.wrap(model, include=["layer1", "bn1"], exclude=["*.bn2"]))
    assert chosen
    assert all(path.startswith(("layer1", "bn1")) and not path.endswith("bn2") for path in chosen)
    with pytest.raises(NoSiteError, match="Closest: .*layer1"):
        prifu.wrap(model, include=["leyer1.0.bn1"])


def test_inplace_and_copy():
    model = zoo.build("test_resnet")
    assert prifu.wrap(model) is not model
    assert not any(isinstance(m, prifu.PriFU) for m in model.modules())
    assert prifu.wrap(model, inplace=True) is model
    assert prifu.unwrap(model, inplace=True) is model
    assert not any(isinstance(m, prifu.PriFU) for m in model.modules())


@pytest.mark.parametrize("preserve", [True, False])
def test_cut(preserve):
    model = zoo.build("test_resnet")
    x = torch.randn(8, 3, 64, 64)
    wrapped = prifu.wrap(model, cut="global_pool", noise=0.3, example_inputs=x, preserve=preserve)
    assert isinstance(wrapped.global_pool.prifu, prifu.CutFilter)
    wrapped.train()(x).sum().backward()
    assert prifu.filters(wrapped)["global_pool"].weight.grad.abs().max() > 0
    wrapped.eval()
    assert not torch.equal(wrapped(x), wrapped(x))
    twin = pickle.loads(pickle.dumps(wrapped))
    assert twin.forward_head(twin.forward_features(x), pre_logits=True).shape[0] == 8
    assert prifu.unwrap(wrapped)(x).shape == (8, 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_channels_last(case, dtype):
    _, wrapped, x = case
    wrapped = wrapped.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=dtype):
        out = wrapped(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out.float(), wrapped(x), rtol=0.2, atol=0.2)


@pytest.mark.slow
def test_compile(case):
    _, wrapped, x = case
    close_first(wrapped)
    compiled = torch.compile(copy.deepcopy(wrapped), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wrapped(x))


def test_export(case):
    _, wrapped, x = case
    close_first(wrapped)
    expected = wrapped(x)
    exported = torch.export.export(wrapped, (x,)).module()
    torch.testing.assert_close(exported(x), expected)


def test_bad_input_is_refused_and_changes_nothing():
    model = zoo.build("test_resnet")
    keys = list(model.state_dict())
    wrapped = prifu.wrap(model)
    with pytest.raises(OrderError, match="unwrap"):
        prifu.wrap(wrapped)
    with pytest.raises(OrderError, match="DDP"):
        prifu.wrap(nn.DataParallel(model))
    with pytest.raises(OrderError, match="torch.compile"):
        prifu.wrap(torch.compile(model))
    with pytest.raises(OrderError, match="EMA"):
        prifu.wrap(torch.optim.swa_utils.AveragedModel(model).eval())
    for settings in ({"alpha": 1.0}, {"alpha": -0.1}, {"alpha": float("nan")}, {"beta": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            prifu.wrap(model, inplace=True, **settings)
    with pytest.raises(ConfigError, match=r"refuses.*\(1, 5, 64, 64\)"):
        prifu.wrap(model, inplace=True, example_inputs=torch.zeros(1, 5, 64, 64))
    with pytest.raises(ConfigError, match="cut"):
        prifu.wrap(model, inplace=True, noise=0.3)
    with pytest.raises(NoSiteError, match="global_pool"):
        prifu.wrap(model, inplace=True, cut="globl_pool")
    with pytest.raises(ConfigError, match="normalization layer"):
        prifu.wrap(model, inplace=True, cut="bn1")
    with pytest.raises(OrderError, match="not wrapped"):
        prifu.unwrap(model)
    with pytest.raises(OrderError, match="not wrapped"):
        prifu.summary(model)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("cut", ["0", "2", "3", ""])
def test_any_module_as_cut_prunes_to_a_plain_model(cut):
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(*layers) if cut else nn.Sequential(nn.Sequential(*layers), nn.ReLU())
    path = cut or "0"
    model = prifu.wrap(net, cut=path, example_inputs=x).eval()
    for unit in prifu.filters(model).values():
        unit.weight.data[:2] = 0.0
    pruned = prifu.prune(model, x)
    torch.testing.assert_close(pruned(x), model(x))
    assert not any(type(m).__module__.startswith("prifu_plugin") for m in pruned.modules())
    assert not any("prifu_plugin" in str(type(m).forward) for m in pruned.modules())


def test_a_container_as_cut_runs_its_filter_once():
    first = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    net = nn.Sequential(first, nn.Linear(4, 2), nn.BatchNorm1d(2))
    x = torch.randn(5, 3)
    wrapped = prifu.wrap(net, cut="0", example_inputs=x, preserve=False).eval()
    torch.testing.assert_close(wrapped[0](x), 0.1 * net[0](x) / (1 + 1e-5) ** 0.5)


def test_a_model_without_norms_is_refused():
    import torchvision

    with pytest.raises(NoSiteError, match="SqueezeNet has no normalization layer"):
        prifu.wrap(torchvision.models.squeezenet1_1())


def test_the_public_surface():
    assert sorted(prifu.__all__) == prifu.__all__ == [
        "AuditData", "AuditReport", "CaptureError", "ConfigError", "CutFilter", "Fastest",
        "FilterConfig", "FilterError", "FilterSchedule", "MaskHistory", "NoSiteError", "OrderError",
        "OverSeeds", "Plan", "PriFU", "PrifuError", "PrifuWarning", "PruneReport", "Relevance",
        "Site", "Split", "Summary", "Threshold", "VerificationError", "__version__", "absorb",
        "audit", "cut_points", "dose_to_beta", "fastest",
        "filters", "fit_alpha", "influence", "learned", "over_seeds", "plan", "prune", "rebuild",
        "recalibrate", "register_leaf", "register_norm", "register_pointwise", "relevance",
        "report", "sites", "split", "status", "summary", "sweep", "unwrap", "wrap",
    ]  # fmt: skip
    assert all(getattr(prifu, name).__doc__ for name in prifu.__all__)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fast_path_of_transformer_layers_is_filtered(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    model = prifu.wrap(nn.Sequential(encoder)).double().eval()
    assert {site.reached for site in prifu.sites(model)} == {"graph"}
    for unit in prifu.filters(model).values():
        unit.weight.data[torch.rand(8) < 0.5] = 0.0
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    slow = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow, rtol=0, atol=1e-12)
        pruned = prifu.prune(model, x)
        torch.testing.assert_close(pruned(x), slow, rtol=0, atol=1e-11)
    assert not [m for m in pruned.modules() if isinstance(m, prifu.PriFU)]


class OptionalMask(nn.Module):
    """A functional normalization in a forward with a branch on None, a flag and a number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, mask=None, *, twice=False, shift=0.0):
        x = self.linear(x)
        if mask is not None:
            x = x * mask
        if twice:
            x = x + x.square()
        if shift:
            x = x + shift * torch.sin(x)
        return F.layer_norm(x, (8,))


@pytest.mark.parametrize("training", [True, False])
def test_functional_normalization_with_arguments(training):
    torch.manual_seed(0)
    plain = OptionalMask().train(training)
    model = prifu.wrap(plain)
    x, mask = torch.randn(2, 5, 8), torch.rand(2, 5, 1)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for args in ((x,), (x, None), (x, mask)):
            for kwargs in ({}, {"twice": True}, {"shift": 0.5}, {"shift": 0.7, "twice": True}):
                torch.testing.assert_close(twin(*args, **kwargs), plain(*args, **kwargs))
        with pytest.raises(TypeError, match="unexpected keyword"):
            twin(x, wrong=1)


def test_tracing_leaves_no_trace():
    class Storing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.last, self.calls, self.seen = None, 0, []
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            self.last, self.calls = self.norm(self.conv(x)), self.calls + 1
            self.seen.append(self.last)
            self.mean.add_(1.0)
            return self.last

    model = Storing()
    prifu.sites(model)
    assert (model.last, model.calls, model.seen) == (None, 0, [])
    assert torch.equal(model.mean, torch.zeros(4))
    wrapped = prifu.wrap(nn.Sequential(model, nn.Conv2d(4, 2, 1)))
    assert (wrapped[0].last, wrapped[0].seen, model.last) == (None, [], None)
    prifu.prune(wrapped, torch.zeros(1, 3, 4, 4))
    assert (wrapped[0].last, wrapped[0].seen) == (None, [])


def test_a_norm_that_is_never_called_is_named():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x):
            return F.layer_norm(self.linear(x), (8,), self.norm.weight, self.norm.bias)

    with pytest.warns(PrifuWarning, match="never calls 'norm'"):
        model = prifu.wrap(Reads())
    assert set(prifu.filters(model)) == {"norm", "layer_norm"}


class UnitNorm(nn.Module):
    """A normalization layer of somebody's own, by torch alone."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        if x.sum() > 1e30:  # no tracer gets through
            return x
        return x / x.norm(dim=1, keepdim=True).clamp_min(1e-6)


def test_registered_norms_are_filtered_trained_and_pruned():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), UnitNorm(8), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    with pytest.raises(NoSiteError):
        prifu.wrap(nn.Sequential(*layers))
    assert prifu.register_norm(UnitNorm, dim=1, channels="width") is UnitNorm
    model = prifu.wrap(nn.Sequential(*layers)).eval()
    (unit,) = prifu.filters(model).values()
    assert len(unit.weight) == 8
    unit.weight.data[:4] = 0.0
    x = torch.randn(2, 3, 8, 8)
    pruned = prifu.prune(model, x)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-6)
    assert pruned.get_submodule("2").in_channels == 4
    assert pruned.get_submodule("0").out_channels == 8  # the norm needs all of its inputs


def test_what_is_no_norm_cannot_be_registered():
    with pytest.raises(ConfigError, match="class of modules"):
        prifu.register_norm(nn.Linear(2, 2), dim=1)
    with pytest.raises(ConfigError, match="batch"):
        prifu.register_norm(UnitNorm, dim=0)


def lazy(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


def test_weights_without_values_are_refused():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(OrderError, match=r"'1\.weight' of Sequential is lazy.*one batch"):
        prifu.wrap(lazy(nn.LazyBatchNorm2d()))
    partly = prifu.wrap(lazy(nn.BatchNorm2d(4))).eval()
    with pytest.raises(OrderError, match=r"'4\.weight' of Sequential is lazy"):
        prifu.prune(partly, x)
    partly(x)
    prifu.prune(partly, x)
    with torch.device("meta"):
        absent = prifu.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    with pytest.raises(OrderError, match="meta device.*to_empty"):
        prifu.prune(absent, x)


def test_weights_made_in_inference_mode_are_refused_with_the_cure():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(OrderError, match="inference_mode.*deepcopy"):
        prifu.wrap(model)
    assert prifu.filters(prifu.wrap(copy.deepcopy(model)))


class Inner(nn.Module):
    """Normalizes with a function."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(4, 4, 1)
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return F.group_norm(self.c(x), 2, self.scale, self.shift)


class Branching(nn.Module):
    """Cannot be traced, and normalizes with a function itself or inside."""

    def __init__(self, own):
        super().__init__()
        self.c, self.n, self.inner, self.own = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Inner(), own

    def forward(self, x):
        h = self.inner(self.n(self.c(x)))
        if h.mean() > 1e6:
            return F.layer_norm(h, h.shape[1:]) if self.own else h
        return h


class Plainly(Branching):
    def forward(self, x):
        h = self.inner(self.n(self.c(x)))
        return h * 0 if h.mean() > 1e6 else h


def test_functional_normalizations_in_parts_of_what_cannot_be_traced_are_found():
    model = prifu.wrap(Plainly(own=False)).eval()
    assert list(prifu.filters(model)) == ["n", "inner.group_norm"]
    prifu.filters(model)["inner.group_norm"].weight.data[1] = 0.0
    assert model(torch.randn(2, 3, 5, 5))[:, 1].abs().max() == 0


def test_a_forward_that_hides_a_functional_normalization_is_named():
    with pytest.warns(PrifuWarning, match="but the forward of Branching cannot be traced"):
        model = prifu.wrap(Branching(own=True))
    assert list(prifu.filters(model)) == ["n", "inner.group_norm"]


def test_a_cut_does_not_delete_filters_inside_the_forward():
    net = nn.Sequential(Functional(), nn.ReLU())
    x = torch.randn(5, 3)
    with pytest.raises(ConfigError, match="functional normalizations in its own forward"):
        prifu.wrap(net, cut="0", example_inputs=x)
    wrapped = prifu.wrap(net, cut="1", example_inputs=x)
    assert len(prifu.filters(wrapped)) == 3
    outside = nn.Sequential(nn.Sequential(net[0]), nn.ReLU(), nn.Linear(4, 2), nn.LayerNorm(2))
    assert len(prifu.filters(prifu.wrap(outside, cut="0", example_inputs=x))) == 4


def test_a_child_named_module_is_no_wrapper():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

        def forward(self, x):
            return self.module(x)

    assert list(prifu.filters(prifu.wrap(Own()))) == ["module.1"]
    for around in (nn.DataParallel(Own()), torch.optim.swa_utils.AveragedModel(Own())):
        with pytest.raises(OrderError, match="wrapper around Own"):
            prifu.wrap(around)


def test_a_norm_that_cannot_be_copied_is_one():
    class Permuting(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    norm = Permuting(4)
    norm.kept = torch.ones(2, requires_grad=True) * 2  # torch copies no computed tensors
    site = prifu.sites(nn.Sequential(norm))[0]
    assert site.channels == 4


def test_a_layer_that_is_called_as_a_function_is_called_is_none():
    class Iterating(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer_norm = nn.LayerNorm(4)

        def forward(self, x):
            for _ in range(int(x.sum()) + 1):  # torch.fx cannot follow
                x = self.layer_norm(x)
            return x

    assert [(site.path, site.refused) for site in prifu.sites(Iterating())] == [("layer_norm", "")]


class Counting(nn.LayerNorm):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


@pytest.mark.parametrize("bias", [False, True])
def test_what_a_norm_stores_on_itself_stays(bias):
    net = prifu.wrap(nn.Sequential(nn.Linear(2, 4), Counting(4)), bias=bias)
    for _ in range(3):
        net(torch.randn(2, 2))
    assert net[1].calls == 3
    assert set(dict(net[1].named_parameters())) >= {"weight", "bias", "prifu.weight"}
    assert net[1]._parameters["weight"] is net[1].weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_norms_without_parameters_are_filtered_in_the_models_type(dtype):
    layers = nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 2)
    net, seen = prifu.wrap(nn.Sequential(*layers).to(dtype)).eval(), []
    x, norm = torch.randn(6, 4).to(dtype), torch.nn.functional.layer_norm

    def noted(x, shape, weight=None, bias=None, eps=1e-5):
        seen.extend(value.dtype for value in (weight, bias) if value is not None)
        return norm(x, shape, weight, bias, eps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "layer_norm", noted)
        net(x)
    assert set(seen) == {dtype}
    prifu.filters(net)["1"].weight.data[::2] = 0.0
    pruned = prifu.prune(net, x)
    assert {p.dtype for p in pruned.parameters()} == {dtype}


def test_a_type_is_asked_of_the_model_and_not_of_its_filters():
    layers = nn.BatchNorm1d(4, affine=False), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
    net = prifu.wrap(nn.Sequential(*layers).bfloat16()).eval()
    x = torch.randn(6, 4).bfloat16()
    pruned = prifu.prune(net, x)
    assert pruned(x).dtype == torch.bfloat16
    edge, cloud = prifu.split(net, "1", x)
    assert torch.equal(cloud(edge(x)), net(x))


class Remembering(nn.Module):
    """Adds what the last call left behind, and takes it away."""

    def __init__(self):
        super().__init__()
        self.calls, self.layer = 0, nn.Linear(2, 2)
        self.layer.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    def forward(self, x):
        y = self.layer(x)
        if hasattr(self, "skip"):
            y = y + self.skip
            del self.skip
        else:
            self.skip = y.detach()
        return y


def test_what_a_hosts_forward_and_its_hooks_store_and_delete_is_kept():
    plain = Remembering()
    hosted = copy.deepcopy(plain)
    hosted.layer._forward_hooks.clear()
    hosted.layer.register_forward_hook(lambda *_: setattr(hosted, "calls", hosted.calls + 1))
    attach(hosted, CutFilter(2, FilterConfig(alpha=0.0)))
    for module in (plain, hosted):
        module.eval()
    for calls in range(1, 5):
        for module in (plain, hosted):
            module(torch.ones(1, 2))
            assert module.calls == calls
            assert hasattr(module, "skip") == (calls % 2 == 1)


class Keeps(nn.Module):
    """Remembers in a queue, in a list inside a dictionary, and in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.last, self.counts = collections.deque(maxlen=5), {"calls": []}
        self.seen = torch.zeros(1)

    def forward(self, x):
        y = self.norm(self.conv(x))
        self.last.append(y)
        self.counts["calls"].append(1)
        self.seen += 1
        return y


def test_looking_at_a_model_leaves_nothing_on_it():
    model = Keeps()
    prifu.sites(model)
    with undisturbed(model), torch.no_grad():
        model(torch.zeros(2, 3, 8, 8))
    assert not model.last
    assert model.counts == {"calls": []}
    assert model.seen == 0


def test_a_cut_at_a_module_that_is_called_twice_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            return self.relu(self.norm(self.relu(self.first(x))))

    with pytest.raises(ConfigError, match=r"'relu' \(ReLU\) is called 2 times"):
        prifu.wrap(Net(), cut="relu", example_inputs=torch.rand(2, 3, 8, 8))


def test_an_exported_model_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    exported = torch.export.export(net, (torch.rand(2, 3, 8, 8),)).module()
    with pytest.raises(OrderError, match="is exported: wrap the original"):
        prifu.wrap(exported)
    with pytest.raises(OrderError, match="'0' of Sequential is exported"):
        prifu.wrap(nn.Sequential(exported, nn.BatchNorm2d(4)))


def test_a_model_with_a_train_of_its_own_is_wrapped():
    """As people freeze batch norms: the method is put on the instance."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    net.train = lambda mode=True: net
    assert list(prifu.filters(prifu.wrap(net))) == ["1"]


class Exchanging(nn.Module):
    """Exchanges two things it stores, so that only their places in its memory tell."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.one, self.other = "a", "b"

    def forward(self, x):
        kept = self.__dict__.pop("one")
        self.other, self.one = kept, self.other
        return self.norm(x)


def test_what_is_exchanged_is_put_back():
    model = Exchanging().eval()
    with undisturbed(model):
        model(torch.randn(2, 4))
        assert (model.one, model.other) == ("b", "a")
    assert (model.one, model.other) == ("a", "b")


def test_norms_of_scripted_parts_are_named():
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    with pytest.warns(FutureWarning, match="deprecated"):
        scripted = torch.jit.trace(inner, torch.zeros(1, 4, 2, 2))
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), scripted)
    with pytest.warns(PrifuWarning, match=r"'2\.1' \(BatchNorm2d\): it is scripted"):
        wrapped = prifu.wrap(net)
    assert list(prifu.filters(wrapped)) == ["1"]


class RootMeanSquare(nn.Module):
    """The same function as torch names it, beside torch.nn.functional's."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.outer(torch.rms_norm(self.inner(x), [6]))


def test_torchs_own_rms_norm_is_found_and_pruned():
    wrapped = prifu.wrap(RootMeanSquare())
    ((path, unit),) = prifu.filters(wrapped).items()
    assert path == "rms_norm"
    unit.weight.data[:2] = 0.0
    pruned = prifu.prune(wrapped, torch.zeros(4, 3))
    assert pruned.outer.in_features == 4


class Operators(nn.Module):
    """Normalizes by operators of torch that few call, some of which return their statistics."""

    def __init__(self, normalize, gate=lambda y: y):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 2)
        self.scale, self.shift = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))
        self.normalize, self.gate = normalize, gate

    def forward(self, x):
        return self.outer(self.normalize(self, self.inner(x)))


def unpacked(self, x):
    y, mean, _ = torch.native_layer_norm(x, [6], self.scale, self.shift, 1e-5)
    return self.gate(y) + mean


OPERATORS = {
    "packet": lambda self, x: self.gate(
        torch.ops.aten.layer_norm(x, [6], self.scale, self.shift, 1e-5)
    ),
    "overload": lambda self, x: self.gate(
        torch.ops.aten.layer_norm.default(x, [6], self.scale, self.shift, 1e-5)
    ),
    "native": lambda self, x: self.gate(
        torch.native_layer_norm(x, [6], self.scale, self.shift, 1e-5)[0]
    ),
    "unpacked": unpacked,
}


@pytest.mark.parametrize("normalize", OPERATORS.values(), ids=list(OPERATORS))
def test_operators_that_normalize_get_filters(normalize):
    plain = Operators(normalize)
    model = prifu.wrap(copy.deepcopy(plain)).eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), plain(x))
    ((path, unit),) = prifu.filters(model).items()
    assert "layer_norm" in path
    unit.weight.data[:4] = 0.0
    plain.gate = lambda y: y * torch.tensor([0.0] * 4 + [1.0] * 2)
    torch.testing.assert_close(model(x), plain(x))
    pruned = prifu.prune(model, x)
    torch.testing.assert_close(pruned(x), model(x))
