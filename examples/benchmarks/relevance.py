"""What does AvgRI of every layer cost, over a plain forward and backward pass on the same data?

    python examples/benchmarks/relevance.py > docs/results/relevance.txt

Both are timed in turns, and the ratio of each pair taken; the table shows the median and quartiles.
"""

import argparse
import statistics
import time

import timm
import torch
from tqdm import tqdm

import prifu_plugin as prifu

MODELS = {"resnet18": 96, "mobilenetv2_100": 96, "convnext_atto": 96, "vit_tiny_patch16_224": 224}


def passes(model, data):
    """Pass forward and backward over the data, as an epoch of training does, without steps."""
    model.eval()
    for x, y in data:
        torch.nn.functional.cross_entropy(model(x), y).backward()
        model.zero_grad()


def seconds(what, *arguments):
    """Return how long a call takes."""
    start = time.perf_counter()
    what(*arguments)
    return time.perf_counter() - start


def main(smoke=False):
    """Print one row a model."""
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads, "
          "2 batches of 16; relevance / forward and backward, median [quartiles]")  # fmt: skip
    for name, size in tqdm(list(MODELS.items())[: 1 if smoke else None], disable=None):
        torch.manual_seed(0)
        plain = timm.create_model(name, num_classes=10)
        wrapped = prifu.wrap(plain)
        data = [(torch.randn(16, 3, size, size), torch.randint(10, (16,))) for _ in range(2)]
        ratios = []
        for turn in range(4 if smoke else 22):
            calls = [(prifu.relevance, wrapped, data), (passes, plain, data)]
            times = {call[0]: seconds(*call) for call in calls[:: 1 if turn % 2 else -1]}
            ratios.append(times[prifu.relevance] / times[passes])
        low, middle, high = statistics.quantiles(ratios[2:], n=4)
        print(f"{name:22}  {middle:.3f} [{low:.3f}, {high:.3f}]", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one model, few rounds")
    main(**vars(parser.parse_args()))
