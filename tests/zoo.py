"""The models of the contract suite, and how the tests close half of their channels."""

import timm
import torch
import torchvision
from probe import images
from torch import nn

import prifu_plugin as prifu

CNNS = [
    "resnet18", "resnet50", "resnetv2_50", "seresnet50", "vgg16_bn", "densenet121",
    "test_resnet", "tv_resnet18", "tv_densenet121", "tv_googlenet", "tv_inception_v3",
]  # fmt: skip
GROUPED = ["resnext50_32x4d", "regnety_002"]
DEPTHWISE = [
    "mobilenetv2_100", "mobilenetv3_small_050", "efficientnet_b0", "test_efficientnet",
    "convnext_atto", "convnextv2_atto", "tv_shufflenet_v2_x0_5", "tv_mobilenet_v3_small",
]  # fmt: skip
TOKENS = [
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224",
    "mixer_s32_224", "test_vit", "tv_vit_b_16",
]  # fmt: skip
ALL = CNNS + GROUPED + DEPTHWISE + TOKENS
WITH_BIAS = [
    "resnet18", "resnetv2_50", "tv_googlenet", "regnety_002", "mobilenetv2_100", "efficientnet_b0",
    "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224",
]  # fmt: skip
LATER = [
    ("vgg16_bn", False), ("swin_tiny_patch4_window7_224", False), ("tv_densenet121", False),
    ("tv_vit_b_16", False), ("seresnet50", False), ("resnext50_32x4d", False),
]  # fmt: skip
"""Half a minute and more each, and like others in this list."""
SMALL = ["test_resnet", "test_efficientnet", "test_vit", "tv_shufflenet_v2_x0_5"]


def build(name):
    torch.manual_seed(0)
    if not name.startswith("tv_"):
        return timm.create_model(name, num_classes=10)
    kwargs = {"init_weights": False} if name in ("tv_googlenet", "tv_inception_v3") else {}
    if name == "tv_vit_b_16":
        kwargs["image_size"] = image_size(name)
    return getattr(torchvision.models, name[3:])(num_classes=10, **kwargs)


def image_size(name):
    """The resolution a test runs at: the model's own where it is fixed, else a small one."""
    special = {"test_vit": 160, "tv_vit_b_16": 112, "vgg16_bn": 160, "tv_inception_v3": 128}
    return special.get(name, 224 if name in TOKENS else 96)


def half_off(model, seed=0):
    """Close half of every filter's channels at random; randomize weights and statistics."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.abs().max() == 0:
            parameter.data.normal_(std=0.02, generator=generator)
    for unit in prifu.filters(model).values():
        keep = torch.rand(unit.weight.shape, generator=generator) < 0.5
        keep[0] |= ~keep.any()
        weight = 0.08 + 0.04 * torch.rand(unit.weight.shape, generator=generator)
        unit.weight.data = torch.where(keep, weight, 0.0).to(unit.weight)
        if unit.bias is not None:
            unit.bias.data.normal_(std=0.2, generator=generator)
    _randomize_norms(model, generator)
    return randomize_statistics(model, seed)


def _randomize_norms(model, generator):
    for module in model.modules():
        weight = None if isinstance(module, prifu.PriFU) else getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            weight.data.uniform_(0.3, 0.7, generator=generator)
            if getattr(module, "bias", None) is not None:
                module.bias.data.normal_(std=0.1, generator=generator)


def randomize_statistics(model, seed=0):
    """Set running statistics at random."""
    generator = torch.Generator().manual_seed(seed)
    for norm in _batch_norms(model):
        norm.running_mean.normal_(std=0.1, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def _batch_norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def measure_statistics(model, size, seed=0):
    """Set running statistics to those of random images, disturbed: no activation is always off.

    Such deep random networks amplify rounding; the exactness of fp32 is tested on others.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = _batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.eval()
    for norm in norms:
        norm.train()
    if norms:
        with torch.no_grad():
            model(images(8, 3, size, size, generator))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        shift = torch.randn(norm.running_mean.shape, generator=generator)
        norm.running_mean += 0.1 * norm.running_var.sqrt() * shift
        # A channel that never changed on these images has no scale to divide by.
        norm.running_var.clamp_(min=0.05 * norm.running_var.mean().item())
        norm.running_var *= 0.7 + 0.6 * torch.rand(norm.running_var.shape, generator=generator)
    return model.eval()
