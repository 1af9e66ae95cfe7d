"""Side by side with Torch-Pruning: does the pruned model compute what the filtered one did?

    pip install torch-pruning
    python examples/benchmarks/side_by_side.py > docs/results/torch-pruning.md

In both, half of every norm's channels are off at random: a filter that is closed here, a scale and
shift of 0 there. Torch-Pruning then removes half of the channels of every group by the norms'
scales (weights where a network has no batch norm), which is what it is made for; prune removes
what it can prove to be without effect. Latency is relative to the filtered model. Timings are
interleaved, medians over the rounds, one thread; prune's with its verification and without it,
Torch-Pruning's with its dependency graph.
"""

import argparse
import copy
import statistics
import sys
import time

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import prifu_plugin as prifu
from prifu_plugin.prune.verify import difference

MODELS = {"test_resnet": 96, "resnet18": 96, "resnet50": 96, "vgg16_bn": 96, "densenet121": 96,
          "mobilenetv2_100": 96, "efficientnet_b0": 96, "regnety_002": 96, "convnext_atto": 96,
          "vit_tiny_patch16_224": 224}  # fmt: skip


def half_off(wrapped, seed):
    """Close half of every filter's channels."""
    generator = torch.Generator().manual_seed(seed)
    for unit in prifu.filters(wrapped).values():
        count = len(unit.weight)
        off = torch.randperm(count, generator=generator)[: count // 2]
        unit.weight.data[off] = 0.0


def zeroed(wrapped):
    """Return the plain model with scale and shift 0 where a filter is closed."""
    plain = prifu.unwrap(copy.deepcopy(wrapped))
    for path, unit in prifu.filters(wrapped).items():
        norm = plain.get_submodule(path)
        with torch.no_grad():
            for parameter in (norm.weight, norm.bias):
                parameter.mul_(unit.open)
    return plain.eval()


def ours(wrapped, x, verify=True):
    """Prune; returns the model and the seconds."""
    start = time.perf_counter()
    pruned = prifu.prune(wrapped, x, verify=verify)
    return pruned, time.perf_counter() - start


def theirs(model, x):
    """Prune half of each group by Torch-Pruning; returns the model and the seconds."""
    import torch_pruning as tp

    batch = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    score = tp.importance.BNScaleImportance() if batch else tp.importance.GroupMagnitudeImportance()
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    attention = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(model, x, score, pruning_ratio=0.5, ignored_layers=heads,
                                  num_heads=attention)  # fmt: skip
    pruner.step()
    for module in model.modules():  # as Torch-Pruning's own example for timm does
        if hasattr(module, "qkv"):
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim
    return model, time.perf_counter() - start


def filtered(name):
    """Return a model with random norms and half of each filter's channels closed."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():  # timm starts residual branches at a scale of 0
        if getattr(module, "bias", None) is not None and "Norm" in type(module).__name__:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    wrapped = prifu.wrap(model).eval()
    half_off(wrapped, 0)
    return wrapped


def macs(model, x):
    """Return the multiply-accumulates of a forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def latencies(models, x, rounds):
    """Run models in turns; return the medians of the ratios to the first."""
    taken = []
    with torch.inference_mode():
        for turn in range(rounds + 2):
            row = [0.0] * len(models)
            for at in [(turn + i) % len(models) for i in range(len(models))]:
                start = time.perf_counter()
                models[at](x)
                row[at] = time.perf_counter() - start
            taken.append([value / row[0] for value in row])
    return [statistics.median(column) for column in zip(*taken[2:], strict=True)]


def compared(name, size, rounds):
    """Return a row of the table."""
    wrapped = filtered(name)
    x, other = torch.randn(2, 3, size, size), torch.randn(3, 3, size, size)
    plain, why, times, found = zeroed(wrapped), "", [], None
    for _ in range(rounds):
        mine, verified = ours(wrapped, x)
        _, alone = ours(wrapped, x, verify=False)
        try:
            found, second = theirs(copy.deepcopy(plain), x)
            with torch.no_grad():
                gap = difference(plain(other), found.eval()(other))
        except Exception as error:  # noqa: BLE001 - a refusal or a broken model is a result
            found, second, why = None, float("nan"), f"{type(error).__name__}: {error}"[:50]
        times.append((verified / second, alone / second, verified))
    with torch.no_grad():
        exact = difference(wrapped(other), mine(other))
    models = [plain, mine] + ([found] if found is not None else [])
    speed, work = latencies(models, x, 9), [macs(m, x) for m in models]
    cells = [name, f"{exact:.0e}", f"{100 * work[1] / work[0]:.0f} %", f"{speed[1]:.2f}"]
    if found is None:
        cells += [why, "", ""]
    else:
        cells += [f"{gap:.0e}", f"{100 * work[2] / work[0]:.0f} %", f"{speed[2]:.2f}"]
    relative = [statistics.median(column) for column in zip(*times, strict=True)]
    cells += [f"{relative[2]:.1f} s", f"{relative[0]:.1f}", f"{relative[1]:.1f}"]
    return "| " + " | ".join(cells) + " |"


def main(rounds):
    """Print the table."""
    import torch_pruning as tp

    torch.set_num_threads(1)
    print("# prune and Torch-Pruning, the same channels off\n")
    print(f"`python {' '.join(sys.argv)}`; Torch-Pruning {tp.__version__}, torch "
          f"{torch.__version__}, {rounds} rounds, seed 0.\n")  # fmt: skip
    print("| model | ours: difference | MACs left | latency | Torch-Pruning: difference "
          "| MACs left | latency | prune takes | times theirs | unverified |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, size in tqdm(MODELS.items(), disable=None):
        print(compared(name, size, rounds), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    main(parser.parse_args().rounds)
