"""What do filters cost? Training steps and inference, wrapped over plain, in turns.

    python examples/benchmarks/cost.py > docs/results/cost.txt
    python examples/benchmarks/cost.py --size 224 --models mobilenetv2_100 convnext_atto
    python examples/benchmarks/cost.py --compiled > docs/results/cost-compiled.txt

Steps are measured back to back and the ratio to the plain one taken, so that a busy machine slows
all; the table shows the median of the ratios and their quartiles, and the same for a copy of the
plain model, which costs nothing: what it differs from 1 by is the machine's. Memory is the most
that exists at once in a training step. With --compiled, torch.compile makes the models first.
"""

import argparse
import copy
import statistics
import time

import timm
import torch
from torch.distributed._tools.mem_tracker import MemTracker
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
    model.eval()

    @torch.no_grad()
    def step():
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


def peak(model, x):
    """Return the most bytes that exist at once in a training step, as torch's MemTracker counts."""
    tracker, step = MemTracker(), training(model, x)
    tracker.track_external(model, x)
    with tracker:
        step()
    (device,) = tracker.get_tracker_snapshot("peak").values()
    return device["Total"]


def main(smoke=False, batch=32, compiled=False, models=tuple(MODELS), size=0):
    """Print one row a model."""
    given = f"batch {batch}" + (f", {size} pixels" if size else "") + compiled * ", compiled"
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads, "
          f"{given}; median of wrapped / plain over pairs [quartiles]")  # fmt: skip
    print(f"{'model':22}  {'training step':22}  {'of a copy':22}  {'inference':22}  "
          f"{'of a copy':22}  peak memory")  # fmt: skip
    for name in tqdm(models[: 1 if smoke else None], disable=None):
        pixels = size or MODELS[name]
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10)
        forms = {"plain": model, "wrapped": prifu.wrap(model), "copy": copy.deepcopy(model)}
        x = torch.randn(batch, 3, pixels, pixels)
        memory = peak(forms["wrapped"], x) / peak(model, x)
        if compiled:
            forms = {label: torch.compile(one) for label, one in forms.items()}
        cells = []
        for kind, rounds in ((training, 24), (inference, 48)):
            steps = {label: kind(one, x) for label, one in forms.items()}
            for found in ratios(steps, 3 if smoke else rounds).values():
                low, middle, high = statistics.quantiles(found, n=4)
                cells.append(f"{middle:.3f} [{low:.3f}, {high:.3f}]")
        print("  ".join(f"{cell:22}" for cell in (name, *cells)) + f"  {memory:.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one model, few rounds")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile")
    parser.add_argument("--models", nargs="+", default=tuple(MODELS), choices=MODELS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=0, help="pixels a side, for all models")
    main(**vars(parser.parse_args()))
