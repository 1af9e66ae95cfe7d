"""Is a pruned model ever slower? Latency of pruned over filtered, in PyTorch and ONNX Runtime.

    python examples/benchmarks/latency.py > docs/results/latency.txt

A share of each filter's channels is closed at random, which is the hardest case: no two layers
that are added close the same ones. Both models run in turns on one thread; the table shows the
median of the ratios over rounds and their quartiles, beside the share of multiply-accumulates left.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import onnxruntime
import timm
import torch
from tqdm import tqdm

import prifu_plugin as prifu

MODELS = ("resnet18", "resnet50", "mobilenetv2_100", "efficientnet_b0", "regnety_002",
          "densenet121", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
          "poolformer_s12")  # fmt: skip
SHARES = (0.1, 0.25, 0.5, 0.75)


def filtered(name, share):
    """Return a model with random norms and a share of each filter's channels closed."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():  # timm starts residual branches at a scale of 0
        if getattr(module, "bias", None) is not None and "Norm" in type(module).__name__:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    wrapped = prifu.wrap(model).eval()
    for unit in prifu.filters(wrapped).values():
        off = torch.randperm(len(unit.weight))[: round(share * len(unit.weight))]
        unit.weight.data[off] = 0.0
    return wrapped


def in_torch(model, x):
    """Return a function that runs a model."""

    @torch.inference_mode()
    def run():
        model(x)

    return run


def in_onnx(model, x, folder):
    """Return a function that runs a model's export in ONNX Runtime on one thread."""
    path = Path(folder) / f"{id(model)}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own libraries
        torch.onnx.export(model, (x,), path, verbose=False, dynamo=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, fed)


def ratios(first, second, rounds):
    """Run two functions in turns and return first over second, three numbers: quartiles."""
    found = []
    for turn in range(rounds + 2):
        taken = {}
        for run in (first, second) if turn % 2 else (second, first):
            start = time.perf_counter()
            run()
            taken[run] = time.perf_counter() - start
        found.append(taken[first] / taken[second])
    return statistics.quantiles(found[2:], n=4)


def main(smoke=False, rounds=30, models=MODELS):
    """Print one row a model and share."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, timm "
          f"{timm.__version__}, one thread, one image of 224 pixels, seed 0, {rounds} rounds\n"
          "pruned / filtered: median [quartiles]")  # fmt: skip
    print(f"{'model':30}  {'closed':6}  {'MACs':5}  {'PyTorch':20}  {'ONNX Runtime':20}")
    cases = [(name, share) for name in models for share in SHARES]
    x = torch.randn(1, 3, 224, 224)
    for name, share in tqdm(cases[: 1 if smoke else None], disable=None):
        wrapped = filtered(name, share)
        pruned = prifu.prune(wrapped, x, verify=False)
        macs = prifu.report(pruned).macs
        cells = []
        with tempfile.TemporaryDirectory() as folder:
            for run in (in_torch, lambda model, x, at=folder: in_onnx(model, x, at)):
                try:
                    low, middle, high = ratios(run(pruned, x), run(wrapped, x), rounds)
                    cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
                except Exception as error:  # noqa: BLE001 - what does not export is a result
                    cells.append(type(error).__name__)
        print(f"{name:30}  {100 * share:4.0f} %  {macs[1] / macs[0]:.3f}  {cells[0]:20}  "
              f"{cells[1]:20}", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one case")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--models", nargs="+", default=MODELS)
    main(**vars(parser.parse_args()))
