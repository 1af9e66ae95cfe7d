"""Networks that know more than the task before it is taught: what fine-tuning starts from."""

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from lab.networks import build, lite0
from lab.scale import ROOT, Scale
from prifu_plugin.data.faces import generate_faces

ATTRIBUTES = ("glasses", "long_hair", "hat", "beard", "earrings", "bushy_brows", "hair_colour",
              "skin_tone", "smiling")  # fmt: skip
BATCH, RATE = 64, 0.1


class Scaled(nn.Sequential):
    """A network behind the scale its training had: [0, 1] to [-1, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W) in [0, 1]."""
        return super().forward(2 * images - 1)


def pretrained(name: str, classes: int, seed: int, scale: Scale) -> nn.Module:
    """Return a pretrained network with a new head.

    Args:
        name: "pretrained-resnet", taught nine attributes of other faces than the studies'; or
            "imagenet-lite0", EfficientNet-Lite0 with ImageNet weights.
        classes: of the new head.
        seed: of the new head.
        scale: how long the first was taught.
    """
    if name == "imagenet-lite0":
        net = lite0()
        torch.manual_seed(seed)
        net.reset_classifier(classes)
        return Scaled(net)
    net = build("resnet", sum(_classes()), 0)
    images, epochs = scale["pretraining"]["images"], scale["pretraining"]["epochs"]
    file = ROOT / "out" / "paper" / f"pretrained-resnet-{images}-{epochs}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        _teach(net, images, epochs)
        save_file(net.state_dict(), file)
    net.load_state_dict(load_file(file))
    torch.manual_seed(seed)
    net.reset_classifier(classes)
    return net.train()


def _classes() -> list[int]:
    return [4 if "colour" in name or "tone" in name else 2 for name in ATTRIBUTES]


def _teach(net: nn.Module, images: int, epochs: int) -> None:
    """Train on all attributes at once, as backbones are that others fine-tune."""
    faces = generate_faces(images, 48, seed=1000)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    steps = epochs * (images // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), desc="pretraining", disable=None):
        pick = torch.randint(images, (BATCH,), generator=generator)
        parts = net(faces.images[pick]).split(_classes(), dim=1)
        loss = sum(
            F.cross_entropy(part, faces.labels[name][pick])
            for part, name in zip(parts, ATTRIBUTES, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
