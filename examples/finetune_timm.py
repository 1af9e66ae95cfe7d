"""Fine-tune a timm architecture with filters, with timm's own parts, and resume.

--alpha closes channels, --dose is their decay over all steps, --init a filter's first weight.
python examples/finetune_timm.py --model resnet50 --pretrained --init 0.3 --data-dir DIR
"""

import argparse
import math
from pathlib import Path

import timm
import torch
from safetensors.torch import save_model
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import prifu_plugin as prifu
from prifu_plugin.data.digits import load_digits


def loaders(args, model):
    """Return training and validation loaders in the model's own data configuration."""
    if args.data_dir:
        config = resolve_data_config({}, model=model)
        train = ImageFolder(f"{args.data_dir}/train", create_transform(**config, is_training=True))
        val = ImageFolder(f"{args.data_dir}/val", create_transform(**config))
    else:
        digits = load_digits(args.seed)
        sizes = (1024, 256) if args.smoke else (4000, 1000)
        parts = digits.part(0, sizes[0]), digits.part(4000, 4000 + sizes[1])
        scaled = [torch.nn.functional.interpolate(part.images, args.img_size) for part in parts]
        train, val = map(TensorDataset, scaled, [part.parity for part in parts])
    return (DataLoader(train, args.batch_size, shuffle=True, drop_last=True),
            DataLoader(val, args.batch_size))  # fmt: skip


@torch.no_grad()
def predict(model, loader, device):
    """Return logits and labels of all images."""
    model.eval()
    found = [(model(images.to(device)).cpu(), labels) for images, labels in loader]
    return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])


def main(args):
    """Train, save after each epoch, prune at the end."""
    torch.manual_seed(args.seed)
    (out := Path(args.out)).mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=args.num_classes)
    train, val = loaders(args, model.to(device))
    # The decay's dose is what counts: beta follows from it and from the schedule.
    rates = [args.lr * (1 + math.cos(math.pi * e / args.epochs)) / 2 for e in range(args.epochs)]
    beta = prifu.dose_to_beta(args.dose, rates * len(train))
    first = next(iter(val))[0][:2].to(device)
    model = prifu.wrap(model, alpha=args.alpha, beta=beta, init=args.init, example_inputs=first)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=args.epochs)
    ema, start = ModelEmaV3(model, decay=0.99), 0
    if args.resume:
        saved = torch.load(args.resume, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        ema.module.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.step(start := saved["epoch"] + 1)
    history = prifu.MaskHistory(model)
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(args.tensorboard)
    for epoch in range(start, args.epochs):
        model.train()
        for images, labels in tqdm(train, desc=f"epoch {epoch}", disable=None):
            loss = torch.nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
        scheduler.step(epoch + 1)
        top1, state = accuracy(*predict(model, val, device))[0].item(), history.record(epoch)
        print(f"epoch {epoch}: loss {loss.item():.3f}, top-1 {top1:.1f} %, {state['open']} of "
              f"{state['channels']} channels open, dose {state['dose']:.2f}")  # fmt: skip
        for name in state if args.tensorboard else ():
            writer.add_scalar(name, state[name], epoch)
        torch.save({"model": model.state_dict(), "ema": ema.module.state_dict(), "epoch": epoch,
                    "optimizer": optimizer.state_dict()}, out / "last.pt")  # fmt: skip
    prifu.recalibrate(model, (images.to(device) for images, _ in train))  # masks have settled
    prifu.learned(*predict(model, val, device))  # warns of a run that ends at chance
    pruned = prifu.prune(model, first)
    save_model(pruned, str(out / "pruned.safetensors"))
    if isinstance(pruned, torch.fx.GraphModule):  # what is pruned in parts has no plan
        (out / "plan.json").write_text(prifu.plan(pruned).to_json())
    history.plot()[0].savefig(out / "masks.png", bbox_inches="tight")
    print(prifu.report(pruned))
    print(f"pruned top-1 {accuracy(*predict(pruned, val, device))[0].item():.1f} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n")[:3]))
    defaults = {"model": "test_resnet", "num-classes": 2, "epochs": 5, "batch-size": 64,
                "img-size": 64, "opt": "adamw", "lr": 2e-3, "alpha": 0.1, "dose": 2.6,
                "init": 0.1, "seed": 0, "out": "out/finetune"}  # fmt: skip
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="%(default)s")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    parser.add_argument("--data-dir", help="an ImageFolder with train/ and val/")
    parser.add_argument("--resume", help="a last.pt of this script")
    parser.add_argument("--tensorboard", help="folder for events of masks over training")
    parser.add_argument("--smoke", action="store_true", help="a minute's run on few images")
    arguments = parser.parse_args()
    if arguments.num_classes < 2 or arguments.epochs < 1:
        parser.error("--num-classes is 2 or more, --epochs 1 or more")
    if arguments.smoke:
        arguments.epochs, arguments.dose = min(arguments.epochs, 3), 0.2
    main(arguments)
