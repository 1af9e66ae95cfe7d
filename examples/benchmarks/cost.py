"""What do filters cost? Training steps and inference, wrapped over plain, in turns.

    python examples/benchmarks/cost.py > docs/results/cost.txt

Steps are measured back to back and the ratio to the plain one taken, so that a busy machine slows
all; the table shows the median of the ratios and their quartiles, and the same for a copy of the
plain model, which costs nothing: what it differs from 1 by is the machine's. Memory is what a step
keeps for its backward pass.
"""

import argparse
import copy
import statistics
import time

import timm
import torch
from tqdm import tqdm

import prifu_plugin as prifu

MODELS = {
    "resnet18": 96,
    "resnet50": 96,
    "mobilenetv2_100": 96,
    "convnext_atto": 96,
    "vit_tiny_patch16_224": 224,
}


def training(model, x):
    """Return a function that makes one training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    y = torch.zeros(len(x), dtype=torch.long)

    def step():
        model.train()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def inference(model, x):
    """Return a function that makes one prediction."""

    @torch.no_grad()
    def step():
        model.eval()
        model(x)

    return step


def ratios(steps, rounds):
    """Time steps in turns, the first one rotating, and return the ratios to "plain" by name."""
    found = {name: [] for name in steps if name != "plain"}
    names = list(steps)
    for turn in range(rounds + 2):
        times = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            steps[name]()
            times[name] = time.perf_counter() - start
        for name, ratio in found.items():
            ratio.append(times[name] / times["plain"])
    return {name: ratio[2:] for name, ratio in found.items()}


def kept_for_backward(model, x):
    """Return the bytes that a training step keeps for its backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(x).sum().backward()
    return sum(storage.nbytes() for storage in kept.values())


def main(smoke=False, batch=32):
    """Print one row a model."""
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads, "
          f"batch {batch}; median of wrapped / plain over pairs [quartiles]")  # fmt: skip
    print(f"{'model':22}  {'training step':22}  {'of a copy':22}  {'inference':22}  "
          f"{'of a copy':22}  kept for backward")  # fmt: skip
    for name, size in tqdm(list(MODELS.items())[: 1 if smoke else None], disable=None):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10)
        models = {"plain": model, "wrapped": prifu.wrap(model), "copy": copy.deepcopy(model)}
        x = torch.randn(batch, 3, size, size)
        cells = []
        for kind, rounds in ((training, 24), (inference, 48)):
            steps = {label: kind(one, x) for label, one in models.items()}
            for found in ratios(steps, 3 if smoke else rounds).values():
                low, middle, high = statistics.quantiles(found, n=4)
                cells.append(f"{middle:.3f} [{low:.3f}, {high:.3f}]")
        kept = kept_for_backward(models["wrapped"], x) / kept_for_backward(model, x)
        print("  ".join(f"{cell:22}" for cell in (name, *cells)) + f"  {kept:.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one model, few rounds")
    parser.add_argument("--batch", type=int, default=32)
    main(**vars(parser.parse_args()))
