"""ONNX: the pruned model exports, and ONNX Runtime agrees at another batch size."""

import warnings

import pytest
import torch
import zoo

import prifu_plugin as prifu

pytestmark = pytest.mark.export
LATER = {"densenet121": pytest.mark.long}  # two minutes
NAMES = ["resnet18", "mobilenetv2_100", "densenet121", "convnext_atto", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=LATER.get(n, ())) for n in NAMES])
def test_onnx_export_and_compile(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    size = zoo.image_size(name)
    wrapped = zoo.half_off(prifu.wrap(zoo.build(name)))
    pruned = prifu.prune(wrapped, torch.zeros(1, 3, size, size))
    x, batch = torch.randn(2, 3, size, size), torch.export.Dim("batch", min=2)
    program = torch.export.export(pruned, (x,), dynamic_shapes=({0: batch},))
    other = torch.randn(5, 3, size, size)
    expected = pruned(other).detach()
    scale = expected.abs().max()
    assert (program.module()(other) - expected).abs().max() <= 1e-5 * scale
    compiled = torch.compile(pruned, fullgraph=True, backend="aot_eager")
    assert (compiled(other) - expected).abs().max() <= 1e-5 * scale
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own libraries
        torch.onnx.export(program, (x,), path, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * scale


def test_a_filtered_model_exports_before_it_is_pruned(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    wrapped = zoo.half_off(prifu.wrap(zoo.build("resnet18"))).eval()
    x, path = torch.randn(1, 3, 64, 64), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own libraries
        torch.onnx.export(wrapped, (x,), path, verbose=False, dynamo=True)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = wrapped(x).detach()
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_sessions_repeat_their_noise_unless_they_are_seeded(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    x, path = torch.randn(1, 3, 32, 32), tmp_path / "edge.onnx"
    settings = {"cut": "global_pool", "noise": 0.3, "example_inputs": x}
    wrapped = prifu.wrap(zoo.build("test_resnet"), **settings).eval()
    edge, _ = prifu.split(prifu.prune(wrapped, x), "global_pool", x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own libraries
        torch.onnx.export(torch.export.export(edge, (x,)), (x,), path, verbose=False)

    def first_upload():
        session = onnxruntime.InferenceSession(path)
        (sent,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(sent)

    assert torch.equal(first_upload(), first_upload())  # as docs/deploy.md warns
    seeded = []
    for seed in (1, 2):
        onnxruntime.set_seed(seed)
        seeded.append(first_upload())
    assert not torch.equal(*seeded)
