import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.channel import Channel, Noise, Projection, Quantizer, image_bytes
from prifu_plugin.config import FilterConfig
from prifu_plugin.cut import CutFilter
from prifu_plugin.errors import ConfigError
from prifu_plugin.keyed import keyed_gaussian

KEY = bytes(range(32))


@given(bits=st.integers(1, 8), count=st.integers(1, 40), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_the_wire_is_exact(bits, count, seed):
    z = torch.randn(3, count, generator=torch.Generator().manual_seed(seed))
    channel = Channel(Quantizer(bits).fit(z))
    wire = channel.encode(z)
    assert len(wire) == -(-3 * count * bits // 8)
    assert torch.equal(channel.decode(wire, z.shape), channel(z))
    assert len(channel(z).unique()) <= 2**bits
    step = (z.max() - z.min()) / (2**bits - 1)
    assert (channel(z) - z).abs().max() <= 0.5001 * step


def test_a_small_channel_falls_below_the_step():
    z = torch.randn(200, 2) * torch.tensor([1.0, 1e-3])
    found = Quantizer(4).fit(z)(z)
    assert len(found[:, 1].unique()) <= 2


def test_the_gradient_passes_straight_through():
    quantizer = Quantizer(2).fit(torch.tensor([-1.0, 1.0]))
    z = torch.tensor([0.3, 5.0], requires_grad=True)
    quantizer(z).sum().backward()
    assert z.grad.tolist() == [1.0, 0.0]


def test_without_a_quantizer_floats_are_sent():
    z = torch.randn(2, 3, 4)
    channel = Channel()
    assert torch.equal(channel.decode(channel.encode(z), z.shape), z)
    assert channel.bytes_per_sample(z) == 48


def test_noise_is_drawn_once_for_each_input():
    z = torch.randn(64, 32)
    noise = Noise(0.5, key=b"one" * 8).eval()
    assert torch.equal(noise(z), noise(z))
    assert torch.equal(noise(z)[5:6], noise(z[5:6]))
    assert not torch.equal(Noise(0.5, key=b"two" * 8).eval()(z), noise(z))
    drawn = (noise(z) - z) / 0.5
    assert abs(float(drawn.std()) - 1) < 0.05
    assert abs(float(drawn.mean())) < 0.05
    assert not torch.equal(noise.train()(z), noise(z))
    assert "one" not in repr(noise)
    # A generator of 32 bits could be tried out: draws must not repeat with such a seed.
    assert not torch.equal(noise(z)[0] - z[0], noise(z)[1] - z[1])
    small = Noise(1e-6, key=b"one" * 8).eval()
    tiny = 1e-5 * z
    assert not torch.equal(small(tiny)[0] - tiny[0], small(tiny)[1] - tiny[1])


@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_is_exact(bias):
    head = nn.Linear(64, 5, bias=bias).double()
    head.weight.data[4] = head.weight.data[0] - 2 * head.weight.data[1]
    projection = Projection(head)
    z = torch.randn(7, 64).double()
    sent = projection(z)
    assert sent.shape == (7, 4)
    torch.testing.assert_close(projection.server()(sent), head(z))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(32, 6, 1, stride=2),
        nn.Conv2d(16, 3, (2, 1), padding="same", bias=False, padding_mode="reflect"),
        nn.Conv1d(40, 4, 3, 2, padding=1, dilation=2),
        nn.Conv3d(9, 1, 2),
        nn.Conv2d(5, 8, 3),  # sees all it is given
    ],
)
def test_a_projection_in_front_of_a_convolution_is_exact(layer):
    layer.double()
    spatial = (7,) * (layer.weight.ndim - 2)
    z = torch.randn(3, layer.in_channels, *spatial).double()
    projection = Projection(layer)
    sent = projection(z)
    seen = min(layer.in_channels, layer.weight[:, 0].numel())
    assert sent.shape == (3, seen, *spatial)
    assert sent.is_contiguous()
    torch.testing.assert_close(projection.server()(sent), layer(z))


def test_a_projection_of_tokens():
    head = nn.Linear(16, 3)
    z = torch.randn(2, 5, 16)
    projection = Projection(head)
    assert projection(z).shape == (2, 5, 3)
    torch.testing.assert_close(projection.server()(projection(z)), head(z))


def test_a_quantizer_of_a_constant_tells_nothing():
    quantizer = Quantizer(8).fit(torch.full((4, 3), 2.0))
    z = torch.tensor([[7.4, 2.0, -9.0]])
    assert quantizer(z).tolist() == [[2.0, 2.0, 2.0]]
    assert not quantizer.levels(z).any()


def test_a_quantizer_that_was_fitted_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        quantizer = Quantizer(4).fit(torch.randn(10, 3))
    z = torch.randn(10, 3, requires_grad=True)
    quantizer(z).square().sum().backward()
    assert z.grad.any()


def test_a_projection_is_a_copy():
    head = nn.Linear(16, 4)
    before, projection = nn.Linear(16, 4), Projection(head)
    before.load_state_dict(head.state_dict())
    z = torch.randn(8, 16)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(projection.server()(projection(z)), before(z))
    assert projection.half().bias.dtype == torch.float16
    assert head.bias.dtype == torch.float32
    assert not list(projection.parameters())


def test_the_state_of_a_projection_of_another_rank_is_loaded():
    low = nn.Linear(8, 3)
    low.weight.data[2] = low.weight.data[0]
    saved, other = Projection(low), Projection(nn.Linear(8, 3))
    other.load_state_dict(saved.state_dict())
    z = torch.randn(5, 8)
    torch.testing.assert_close(other.server()(other(z)), low(z))
    with pytest.raises(RuntimeError, match="size mismatch for rest"):
        Projection(nn.Linear(8, 4)).load_state_dict(saved.state_dict())


def test_a_projection_keeps_small_weights_of_large_values():
    scales = torch.logspace(0, 4, 96)
    head = nn.Linear(96, 120)
    head.weight.data = torch.randn(120, 96) / 10 / scales
    z = torch.randn(50, 96) * scales
    projection = Projection(head)
    torch.testing.assert_close(projection.server()(projection(z)), head(z), rtol=0, atol=2e-4)


def test_nothing_is_seen_of_a_layer_that_is_0():
    head = nn.Linear(8, 3)
    head.weight.data.zero_()
    projection, z = Projection(head), torch.randn(5, 8)
    assert not projection(z).any()
    assert torch.equal(projection.server()(projection(z)), head(z))


@pytest.mark.parametrize(
    "z", [torch.zeros(2, 7), torch.zeros(2, 8, dtype=torch.long), torch.zeros(8)]
)
def test_a_projection_refuses_what_its_layer_would(z):
    with pytest.raises(ConfigError, match="takes 8 floating-point channels"):
        Projection(nn.Linear(8, 3))(z)


def test_a_projection_before_a_quantizer():
    head = nn.Linear(64, 2)
    z = torch.randn(100, 64)
    projection = Projection(head)
    channel = Channel(projection, Quantizer(8).fit(projection(z)))
    assert channel.bytes_per_sample(z) == 2
    assert (projection.server()(channel(z)) - head(z)).abs().max() < 0.1


def test_images_on_the_wire():
    generator = torch.Generator().manual_seed(0)
    found = image_bytes(torch.rand(2, 3, 32, 32, generator=generator))
    assert found["raw"] == 3072
    assert found["png"] > 3000
    assert found["jpeg"] < 3072


def broken_head():
    head = nn.Linear(4, 2)
    head.weight.data[0, 0] = float("nan")
    return head


@pytest.mark.parametrize(
    "make",
    [
        lambda: Quantizer(0),
        lambda: Quantizer(9),
        lambda: Quantizer(4)(torch.zeros(2)),
        lambda: Quantizer(4).fit(torch.tensor([float("nan")])),
        lambda: Noise(-1, key=b"k" * 32),
        lambda: Noise(0.1, key=b""),
        lambda: Noise(0.1, key="word" * 8),
        lambda: Quantizer(4.0),
        lambda: Projection(nn.Conv2d(4, 4, 1, groups=2)),
        lambda: Projection(nn.BatchNorm1d(4)),
        lambda: Projection(nn.ConvTranspose2d(4, 4, 1)),
        lambda: Projection(broken_head()),
        lambda: Channel(Quantizer(4), Noise(0.1, key=b"k" * 32)),
        lambda: Quantizer(4).fit(torch.randn(3)).unpack(b"123", (3,)),
    ],
)
def test_bad_input(make):
    with pytest.raises(ConfigError):
        make()


def test_fine_tuning_through_a_coarse_quantizer_recovers_the_task():
    torch.manual_seed(0)
    x = torch.randn(600, 12)
    y = torch.bucketize(x[:, :3].sum(1), torch.tensor([-1.2, 0.0, 1.2]))
    edge = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    cloud = nn.Linear(4, 4)
    parts = nn.ModuleList([edge, cloud])

    def train(channel, steps):
        optimizer = torch.optim.Adam(parts.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(cloud(channel(edge(x))), y).backward()
            optimizer.step()

    train(Channel(), 150)
    channel = Channel(Quantizer(1).fit(edge(x)))
    with torch.no_grad():
        before = (cloud(channel(edge(x))).argmax(1) == y).double().mean()
        whole = (cloud(edge(x)).argmax(1) == y).double().mean()
    train(channel, 150)
    with torch.no_grad():
        after = (cloud(channel(edge(x))).argmax(1) == y).double().mean()
    assert before < whole - 0.02
    assert after > before + 0.02


@pytest.mark.parametrize("kind", ["wrapped", "pruned"])
def test_a_projection_behind_filters(kind):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    x = torch.randn(4, 3, 8, 8)
    model = prifu.wrap(nn.Sequential(*layers, nn.Linear(8, 3)), cut="3", example_inputs=x).eval()
    model.get_submodule("3").prifu.prifu.weight.data[:4] = 0.0
    if kind == "pruned":
        model = prifu.prune(model, x)
    edge, _ = (
        prifu.split(model, "3", x) if kind == "wrapped" else prifu.split(model, last(model), x)
    )
    projection = Projection(model.get_submodule("4"))
    expected = model(x)
    torch.testing.assert_close(projection.server()(projection(edge(x))), expected)


def last(pruned):
    """Return the name of the node that the head reads."""
    head = next(node for node in pruned.graph.nodes if node.target == "4")
    return head.args[0].name


def test_edge_and_channel_are_one_module_that_is_saved_and_exported(tmp_path):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    edge = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    z = edge(torch.randn(50, 6))
    head = nn.Linear(4, 3)
    phone = nn.Sequential(edge, Channel(Projection(head), Quantizer(4))).eval()
    phone[1].steps[1].fit(phone[1].steps[0](z))
    save_file(phone.state_dict(), tmp_path / "phone.safetensors")
    fresh = nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.ReLU()),
                          Channel(Projection(nn.Linear(4, 3)), Quantizer(4))).eval()  # fmt: skip
    fresh.load_state_dict(load_file(tmp_path / "phone.safetensors"))
    x = torch.randn(5, 6)
    assert torch.equal(fresh(x), phone(x))
    exported = torch.export.export(phone, (x,)).module()
    assert torch.equal(exported(x), phone(x))


@pytest.mark.parametrize("steps", [(), (Quantizer(4).fit(torch.randn(9, 3)),), (Noise(0.1, KEY),)])
def test_no_samples_pass(steps):
    channel = Channel(*steps).eval()
    z = torch.zeros(0, 3)
    assert channel(z).shape == (0, 3)
    assert channel.decode(channel.encode(z), (0, 3)).shape == (0, 3)


def test_bytes_of_another_shape_are_refused():
    channel = Channel().eval()
    wire = channel.encode(torch.randn(2, 3))
    for shape, sent in (((2, 4), wire), ((2, 3), wire[:-2])):
        with pytest.raises(ConfigError, match="bytes are not fp32"):
            channel.decode(sent, shape)


def test_ranges_that_fp32_cannot_divide_are_refused():
    with pytest.raises(ConfigError, match="scale them down"):
        Quantizer(4).fit(torch.tensor([3e38, -3e38]))


def test_the_same_image_in_another_batch_gets_the_same_noise():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU()
    edge = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten()).eval()
    images = torch.rand(64, 3, 32, 32)
    with torch.no_grad():
        together, alone = edge(images), torch.cat([edge(image[None]) for image in images])
        assert not torch.equal(together, alone)
        first, second = keyed_gaussian(together, KEY), keyed_gaussian(alone, KEY)
        same = (first == second).flatten(1).all(1)
        assert same.float().mean() > 0.95
        # One that differs a little is another one.
        other = keyed_gaussian(edge(images + 0.01 * torch.rand_like(images)), KEY)
    assert not (first == other).flatten(1).all(1).any()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_steps_follow_the_scale_of_an_upload(scale):
    z = torch.randn(2, 64, dtype=torch.float64) * scale
    drawn = keyed_gaussian(z, KEY)
    assert torch.equal(drawn, keyed_gaussian(z * (1 + 1e-12), KEY))
    assert torch.equal(drawn[0], drawn[1]) == (scale == 0)


@pytest.mark.parametrize("channel", [Channel(), Channel(Quantizer(4).fit(torch.randn(9, 3)))])
def test_what_is_not_finite_is_not_sent(channel):
    with pytest.raises(ConfigError, match="nothing is sent"):
        channel.encode(torch.tensor([[1.0, float("nan"), 0.0]]))


def test_half_uploads_are_projected():
    assert Projection(nn.Linear(8, 2))(torch.randn(3, 8).half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("count", "jitter", "least"),
    [
        (3, 1e-7, 1.0),
        (512, 5e-4, 0.6),
        pytest.param(200_000, 1e-7, 1.0, marks=pytest.mark.slow),
    ],
)
def test_rounding_draws_no_other_noise(count, jitter, least):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(100, count, generator=generator)
    rounded = z * (1 + jitter * torch.randn(z.shape, generator=generator))
    same = (keyed_gaussian(z, KEY) == keyed_gaussian(rounded, KEY)).all(1)
    assert same.float().mean() >= least
    other = keyed_gaussian(z + 0.05 * torch.randn(z.shape, generator=generator), KEY)
    assert not (keyed_gaussian(z, KEY) == other).all(1).any()


def test_few_values_among_many_constants_are_told_apart():
    torch.manual_seed(0)
    z = torch.randn(512).repeat(200, 1)
    z[:, :4] += 0.3 * torch.randn(200, 4)
    noise = Noise(0.1, KEY).eval()(z) - z
    assert len({tuple(row) for row in noise[:, 100:103].round(decimals=4).tolist()}) > 198


def test_no_values_need_no_noise():
    assert keyed_gaussian(torch.zeros(2, 0), KEY).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_projection_of_a_half_precision_head_sees_what_it_sees(dtype):
    torch.manual_seed(0)
    head = nn.Linear(1280, 10).to(dtype)
    projection = Projection(head)
    assert projection.basis.shape == (10, 1280)
    z = torch.randn(5, 1280).to(dtype)
    expected, found = head(z).float(), projection.server()(projection(z)).float()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_sparse_uploads_share_no_noise():
    """Two that did would show their difference, and with it what each of them holds."""
    x = torch.zeros(400, 1024)
    x[torch.arange(400), torch.randperm(1024)[:400]] = 1.0
    for finest in (float("inf"), 3.0):
        assert len({tuple(row[:4].tolist()) for row in keyed_gaussian(x, KEY, finest)}) == 400


def test_uploads_that_differ_in_one_value_share_no_noise():
    torch.manual_seed(0)
    cut = CutFilter(64, FilterConfig(noise=0.3)).eval()
    cut.key = KEY
    x = torch.randn(1, 64, 8, 8)
    others = x.repeat(50, 1, 1, 1)
    others.flatten(1)[torch.arange(50), torch.randperm(4096)[:50]] += 0.9
    noise = [cut(y) - y for y in (x, *others.split(1))]
    assert not any(torch.allclose(noise[0], other, atol=1e-3) for other in noise[1:])


def test_a_large_mean_does_not_hide_what_differs():
    torch.manual_seed(0)
    cut = CutFilter(16, FilterConfig(noise=0.3)).eval()
    cut.key = KEY
    cut.running_mean[0] = 1000.0
    x = torch.randn(60, 16, 4, 4)
    x[:, 0] += 1000.0
    noise = (cut(x) - x)[:, 1:].flatten(1)
    assert len({tuple(row[:3].round(decimals=3).tolist()) for row in noise}) == 60


def test_keyed_noise_is_drawn_on_the_cpu_wherever_tensors_are_made():
    torch.set_default_device("meta")
    try:
        z = torch.ones(2, 3, device="cpu")
        assert keyed_gaussian(z, KEY).device.type == "cpu"
    finally:
        torch.set_default_device(None)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.parametrize("how", ["trace", "export"])
def test_noise_with_a_key_cannot_be_frozen(how):
    noise, z = Channel(Noise(0.3, key=b"k" * 32)).eval(), torch.randn(2, 4)
    with pytest.raises(ConfigError, match="would hold one fixed draw"):
        torch.jit.trace(noise, z) if how == "trace" else torch.export.export(noise, (z,))


def test_what_is_no_upload_is_said():
    channel = Channel(Quantizer(4).fit(torch.randn(5, 4))).eval()
    with pytest.raises(ConfigError, match="The upload is a tuple"):
        channel.encode((torch.randn(2, 4),))
    with pytest.raises(ConfigError, match="shape=8: pass that"):
        channel.decode(b"1234", 8)
    with pytest.raises(ConfigError, match="no tensor"):
        Quantizer(4).fit(torch.randn(5, 4).numpy())


@pytest.mark.parametrize("shape", [(-50, 7, -3), "abc", None, (50.0, 21)])
@pytest.mark.parametrize("bits", [0, 8])
def test_shapes_that_are_none_are_refused(shape, bits):
    channel = Channel(Quantizer(bits).fit(torch.randn(4, 3))) if bits else Channel()
    with pytest.raises(ConfigError, match="whole numbers"):
        channel.decode(b"1234", shape)
    with pytest.raises(ConfigError, match="What arrived is a NoneType"):
        channel.decode(None, (1, 2))


def test_whole_numbers_arrive_as_they_are_decoded():
    z = torch.randint(-9, 9, (20, 3), dtype=torch.int32)
    channel = Channel(Quantizer(4).fit(z)).eval()
    assert torch.equal(channel.decode(channel.encode(z), z.shape), channel(z))
