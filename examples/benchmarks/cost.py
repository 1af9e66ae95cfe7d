"""What do filters cost? Training steps and inference, wrapped over plain, in turns.

    python examples/benchmarks/cost.py > docs/results/cost.txt

Each pair of steps is measured back to back and its ratio taken, so that a busy machine slows both;
the table shows the median of the ratios and their quartiles. Memory is what a step keeps for its
backward pass.
"""

import argparse
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


def ratios(plain, wrapped, rounds):
    """Time two steps in turns, the first alternating, and return the ratios of pairs."""
    found = []
    for turn in range(rounds + 2):
        times = {}
        for name, step in [("plain", plain), ("wrapped", wrapped)][:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            step()
            times[name] = time.perf_counter() - start
        found.append(times["wrapped"] / times["plain"])
    return found[2:]


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
    print(f"{'model':22}  {'training step':22}  {'inference':22}  kept for backward")
    for name, size in tqdm(list(MODELS.items())[: 1 if smoke else None], disable=None):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10)
        wrapped = prifu.wrap(model)
        x = torch.randn(batch, 3, size, size)
        cells = []
        for kind, rounds in ((training, 30), (inference, 60)):
            found = ratios(kind(model, x), kind(wrapped, x), 3 if smoke else rounds)
            low, middle, high = statistics.quantiles(found, n=4)
            cells.append(f"{middle:.3f} [{low:.3f}, {high:.3f}]")
        kept = kept_for_backward(wrapped, x) / kept_for_backward(model, x)
        print(f"{name:22}  {cells[0]:22}  {cells[1]:22}  {kept:.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one model, few rounds")
    parser.add_argument("--batch", type=int, default=32)
    main(**vars(parser.parse_args()))
