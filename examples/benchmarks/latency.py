"""Is a pruned model ever slower? Latency of pruned over filtered, in PyTorch and ONNX Runtime.

    python examples/benchmarks/latency.py > docs/results/latency.txt

A share of each filter's channels is closed at random, which is the hardest case: no two layers
that are added close the same ones. The filtered model and the pruned ones run in turns on one
thread; the table shows medians of the ratios over rounds: "smallest" is what prune returns by
default, "quickest" what `prifu.fastest` chooses, with its round_to and move_cost; (all, 0) keeps
every channel and folds the filters.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import onnxruntime
import timm
import torch
from tqdm import tqdm

import prifu_plugin as prifu

MODELS = ("mobilenetv2_100", "efficientnet_b0", "regnety_002", "convnext_atto",
          "vit_tiny_patch16_224", "resnet50", "densenet121")  # fmt: skip
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


def in_onnx(x, folder):
    """Return a function that makes a session of ONNX Runtime, on one thread, of a model."""

    def build(model):
        path = Path(folder) / f"{id(model)}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own libraries
            torch.onnx.export(model, (x,), path, verbose=False, dynamo=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        fed = {session.get_inputs()[0].name: x.numpy()}
        return lambda: session.run(None, fed)

    return build


def main(smoke=False, rounds=15, models=MODELS):
    """Print one row a model and share."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, timm "
          f"{timm.__version__}, one thread, one image of 224 pixels, seed 0, {rounds} rounds\n"
          "pruned / filtered")  # fmt: skip
    kinds = [f"{name}: {what}" for name in ("PyTorch", "ONNX") for what in ("smallest", "quickest")]
    print(f"{'model':22}  {'closed':6}  " + "  ".join(f"{kind:20}" for kind in kinds))
    cases = [(name, share) for name in models for share in SHARES]
    x = torch.randn(1, 3, 224, 224)
    for name, share in tqdm(cases[: 1 if smoke else None], disable=None):
        wrapped, cells = filtered(name, share), []
        with tempfile.TemporaryDirectory() as folder:
            for build in (None, in_onnx(x, folder)):
                found = prifu.fastest(wrapped, x, build=build, rounds=rounds)
                way = found.round_to, found.move_cost
                cells.append(f"{found.ratios[1, 0.0]:.2f}")
                width = "all" if way[0] >= 2**30 else way[0]
                cells.append(f"{found.ratios[way]:.2f} ({width}, {way[1]:g})")
        cells = "  ".join(f"{cell:20}" for cell in cells)
        print(f"{name:22}  {100 * share:4.0f} %  {cells}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one case")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=MODELS)
    main(**vars(parser.parse_args()))
