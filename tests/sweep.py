"""Every architecture of timm and torchvision: wrapped, trained a step, pruned, compared.

    python tests/sweep.py run      # resumable; one process a model, one family member a family
    python tests/sweep.py table    # docs/results/zoo.json and docs/zoo.md from what has run

A family are the models of one file of timm or torchvision whose module trees are the same up to
widths and repeats; its member with the fewest parameters is run, and the table says for whom.
Detectors run on images of SMALL, where they take a size. From LARGE parameters on, runs of blocks
that are alike are shortened to two, and the row says how many were left out. Beyond HUGE the
model is built with two blocks.
"""

import collections
import json
import multiprocessing
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import probe
import timm
import torch
import torchvision
import zoo
from torch import nn
from tqdm import tqdm

import prifu_plugin as prifu
from prifu_plugin.errors import NoSiteError

ROOT = Path(__file__).resolve().parent.parent
OUT, RESULTS = ROOT / "out" / "zoo", ROOT / "docs" / "results" / "zoo.json"
SECONDS, GIGABYTES = 480, 14
LARGE = 12_000_000
HUGE = 2_000_000_000
LITTLE = 0.005  # of a model's work: a share of less says nothing
SMALL = {"min_size": 160, "max_size": 320}
APART = ("efficientvit_m5",)  # was seen to end otherwise than its family
EXPLAINED = {  # by looking at what is kept
    "halonet_h1": "its heads share a dimension with the batch: a channel of their values goes only "
    "if no head needs it",
}
DETECTORS = [f"tv_{name}" for name in torchvision.models.list_models(torchvision.models.detection)]


def names():
    return timm.list_models() + [f"tv_{name}" for name in torchvision.models.list_models()]


def build(name):
    torch.manual_seed(0)
    if not name.startswith("tv_"):
        return timm.create_model(name)
    builder = torchvision.models.get_model_builder(name[3:])
    settings = {"weights": None}
    if name[3:] in ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"):
        settings["init_weights"] = False
    if any(part in builder.__module__ for part in ("segmentation", "detection")):
        settings["weights_backbone"] = None
    try:  # detectors that scale images up to 800 pixels need minutes and 14 GB for no other result
        return builder(**settings, **smaller(name)) if name in DETECTORS else builder(**settings)
    except TypeError:  # SSD has a size of its own
        return builder(**settings)


def smaller(name):
    """Return the size that a detector is run at; heads that see each box alone get few of them."""
    return SMALL | {"box_detections_per_img": 10} if "keypoint" in name else SMALL


def family(name):
    """Return the file a model comes from and what its module tree is, widths and repeats aside."""
    with torch.device("meta"):
        model = build(name)
    parts = set()
    for path, module in model.named_modules():
        kind = [re.sub(r"\d+", "#", path), type(module).__name__]
        if isinstance(module, nn.modules.conv._ConvNd):
            per_group = module.in_channels // module.groups
            grouping = "dense" if module.groups == 1 else "depth" if per_group == 1 else "grouped"
            kind += [str(module.kernel_size), str(module.stride), grouping, module.bias is None]
        parts.add(tuple(map(str, kind)))
    size = sum(p.numel() for p in model.parameters())
    apart = [name] if name in APART else []
    return [type(model).__module__, sorted(parts), *apart], size


def families():
    """Return representative -> members, smallest representative first; worked out once."""
    file = OUT / "families.json"
    if file.exists():
        return json.loads(file.read_text())
    groups = collections.defaultdict(list)
    for name in tqdm(names(), desc="families", disable=None):
        try:
            key, size = family(name)
        except Exception as error:  # a model that cannot be built on the meta device runs alone
            key, size = [name, repr(error)], 0
        groups[json.dumps(key)].append((size, name))
    ordered = sorted(groups.values(), key=min)
    found = {min(members)[1]: sorted(name for _, name in members) for members in ordered}
    file.write_text(json.dumps(found))
    return found


def example(name, model):
    """Return a small batch that the model takes, its own size if it takes no smaller one."""
    if name.startswith("tv_raft"):
        return (torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128))
    settings = getattr(model, "pretrained_cfg", None) or {}
    channels, own, _ = settings.get("input_size") or (3, 224, 224)
    if type(model).__module__.startswith("torchvision.models.video"):
        tries = [(2, 3, 8, 64, 64), (2, 3, 16, 112, 112), (2, 3, 16, 224, 224)]
    else:
        least = 128 if "inception" in name else 96
        tries = [(2, channels, size, size) for size in (least, 160, own)]
    for shape in tries:
        try:
            with torch.no_grad():
                model.eval()(torch.randn(shape))
        except Exception:
            continue
        return (torch.randn(shape),)
    raise ValueError(f"takes none of {tries}")


def shorten(model):
    """Leave out blocks that are like the two before them; return how many.

    Two stay, since neighbours often differ in what shapes do not show (shifted windows).
    """
    left_out = 0
    for holder in list(model.modules()):
        if not isinstance(holder, nn.Sequential | nn.ModuleList):
            continue
        kept, last, run = [], None, 0
        for name, block in holder.named_children():
            shapes = [(key, tuple(value.shape)) for key, value in block.state_dict().items()]
            alike = (type(block), shapes) if shapes else (type(block), repr(block))
            run = run + 1 if alike == last else 1
            last = alike
            if run <= 2:
                kept.append((name, block))
        if len(kept) == len(holder):
            continue
        left_out += len(holder) - len(kept)
        if isinstance(holder, nn.ModuleList):
            kept = [(str(place), block) for place, (_, block) in enumerate(kept)]
        holder._modules.clear()
        holder._modules.update(kept)
    return left_out


def built(name, short=False):
    """Return a model, an example that it takes, and how many blocks were left out."""
    size = parameters(name)
    if size > HUGE:  # would not fit before its blocks are left out
        model = timm.create_model(name, depth=2)
        return model, example(name, model), depth(name) - 2
    model = build(name)
    x = example(name, model)
    if size < LARGE and not short:
        return model, x, 0
    left_out = shorten(model)
    try:
        with torch.no_grad():
            model.eval()(*x)
    except Exception:  # its forward counts on blocks that were left out
        return build(name), x, 0
    return model, x, left_out


def parameters(name):
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in build(name).parameters())
    except Exception:  # not to be built there
        return sum(p.numel() for p in build(name).parameters())


def depth(name):
    with torch.device("meta"):
        return len(build(name).blocks)


def run_one(name, short=False):
    """Return the row of one model; short leaves repeated blocks out of a small one too."""
    model, x, left_out = built(name, short)
    row = {"name": name, "left_out": left_out}
    if getattr(getattr(model, "transform", None), "max_size", 0) == SMALL["max_size"]:
        row["settings"] = smaller(name)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["input"] = [list(t.shape) for t in x]
    model.eval()
    with torch.no_grad():
        plain = model(*x)
    start = time.perf_counter()
    try:
        wrapped = prifu.wrap(model)
    except NoSiteError as error:
        return row | {"outcome": "refused: no normalization layer", "why": str(error)[:200]}
    row["seconds_wrap"] = round(time.perf_counter() - start, 2)
    del model
    row["sites"] = dict(collections.Counter(s.reached for s in prifu.sites(wrapped)))
    with torch.no_grad():
        row["preserved"] = gap(plain, wrapped(*x))
    try:
        row["untrained"] = untrained(wrapped, lesson(wrapped, x))
    except Exception as error:
        row["untrained"] = [f"no training step: {error}"[:100]]
        wrapped.eval()
    zoo.half_off(wrapped)
    images = [t.ndim for t in x] == [4] and x[0].shape[1] == 3
    if images:
        zoo.measure_statistics(wrapped, x[0].shape[-1])
    start = time.perf_counter()
    pruned = prifu.prune(wrapped, x)
    row["seconds_prune"] = round(time.perf_counter() - start, 2)
    report = prifu.report(pruned)
    row["way"] = report.way
    more = tuple(torch.cat([t, torch.randn_like(t[:1])]) for t in x)
    with torch.no_grad():
        row["difference"] = gap(wrapped(*more), pruned(*more))
    exact = [check.difference for check in report.checks if check.dtype == "float64"]
    row["fp64"] = max(exact, default=None)  # none where the model casts inside
    row["macs"], row["parameters_pruned"] = list(report.macs), report.parameters[1]
    row["kept"] = sorted({reason for _, reason in report.notes})
    there = sum(fate.channels - fate.removed for fate in report.layers)
    row["constant"] = round(sum(fate.constant for fate in report.layers) / max(there, 1), 3)
    row["saved"], row["possible"] = report.saved, None
    if row["parameters"] < 60e6 and images and isinstance(plain, torch.Tensor):
        wrapped.double()
        for count in (4, 16, 64):  # what a few images leave off by chance, more of them do not
            try:
                least = probe.least_share(wrapped, tuple(x[0].shape[1:]), count)
            except (MemoryError, RuntimeError) as error:
                if "alloc" not in str(error) and not isinstance(error, MemoryError):
                    raise
                break  # as far as memory goes
            row["possible"] = 1 - float(least)
            if row["saved"] >= 0.95 * row["possible"] or row["parameters"] > 30e6:
                break
        if row["possible"] and row["saved"] < 0.95 * row["possible"]:
            row["awake"] = awake(wrapped, tuple(x[0].shape[1:]))
    return row | {"outcome": "exact"}


def awake(wrapped, shape):
    """Return what could be saved if no activation were at rest for all images of the probe."""
    try:
        return 1 - float(probe.least_share(wrapped, shape, awake=True))
    except (MemoryError, RuntimeError):
        return None


def gap(expected, found):
    from prifu_plugin.prune.verify import difference

    return difference(expected, found)


def lesson(wrapped, x):
    """Return what a training step is given: detectors want targets, auxiliary heads their size."""
    module = type(wrapped).__module__
    if module.startswith("torchvision.models.detection"):
        return *x, [target(image) for image in x[0]]
    return (torch.randn(2, 3, 299, 299),) if module.endswith(".inception") else x


def target(image):
    """Return one object for any detector: its box, mask and key points."""
    height, width = image.shape[-2:]
    left, top, right, bottom = width // 8, height // 8, width * 3 // 4, height * 3 // 4
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, top:bottom, left:right] = 1
    points = torch.tensor([(left + right) / 2, (top + bottom) / 2, 1.0])
    return {
        "boxes": torch.tensor([[left, top, right, bottom]]).float(),
        "labels": torch.ones(1, dtype=torch.int64),
        "masks": mask,
        "keypoints": points.expand(1, 17, 3),
    }


def untrained(wrapped, given):
    """Return the filters that get no finite gradient in a training step."""
    wrapped.train()
    total = 0.0
    for leaf in torch.utils._pytree.tree_leaves(wrapped(*given)):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            total = total + (leaf * torch.randn_like(leaf)).sum()
    total.backward()
    missing = []
    for path, unit in prifu.filters(wrapped).items():
        if unit.weight.grad is None or not torch.isfinite(unit.weight.grad).all():
            missing.append(path)
    wrapped.zero_grad()
    wrapped.eval()
    return missing


def child(name, gigabytes=GIGABYTES, seconds=SECONDS, short="", out=OUT):
    bytes_, seconds = int(float(gigabytes) * 2**30), int(seconds)
    resource.setrlimit(resource.RLIMIT_DATA, (bytes_, bytes_))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        row = run_one(name, bool(short))
    except Exception as error:
        why = " ".join(str(error).split())[:400]
        row = {"name": name, "outcome": f"failed: {type(error).__name__}", "why": why}
    (Path(out) / f"{name}.json").write_text(json.dumps(row | {"code": code()}))


def code():
    """Return which commit of the package has been run, with a mark if files differ from it."""
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(ask, capture_output=True, text=True).stdout.strip()


def run(pattern="", part="1/1"):
    """Run all families whose name has a pattern: first what is least known, then what is quick.

    Args:
        pattern: part of a name.
        part: "1/2" and "2/2" share the work of two cores.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    todo = [n for n in families() if pattern in n and not (OUT / f"{n}.json").exists()]
    known = committed()
    todo.sort(key=lambda name: urgency(known.get(name)))
    first, step = map(int, part.split("/"))
    for name in tqdm(todo[first - 1 :: step], disable=None):
        run_apart(name)


def run_apart(name, gigabytes=GIGABYTES, seconds=SECONDS, out=OUT):
    """Run one model in a process of its own; whatever becomes of that, there is a row."""
    torch.set_num_threads(1)  # threads do not outlive a fork
    arguments = (name, gigabytes, seconds, "", out)
    process = multiprocessing.get_context("fork").Process(target=child, args=arguments)
    process.start()
    process.join(4 * seconds)  # other work beside may take the cores
    why = f"killed ({process.exitcode})"
    if process.exitcode is None:
        process.kill()
        process.join()
        why = f"more than {4 * seconds} s"
    elif process.exitcode == -signal.SIGXCPU:
        why = f"more than {seconds} s of a core"
    file = out / f"{name}.json"
    if not file.exists():
        file.write_text(json.dumps({"name": name, "outcome": "not finished", "why": why}))


def urgency(row):
    """Return what a row is sorted by: none, one that is not good, and how long it takes."""
    if row is None:
        return 0, 0.0
    return 2 if is_good(row) else 1, row.get("seconds_prune", 0.0)


def is_good(row):
    """Whether a row need not be run again soon: exact, and nothing kept that could go."""
    saved = row["saved"] / row["possible"] if row.get("possible") else 1.0
    return row["outcome"] != "not finished" and "failed" not in row["outcome"] and saved >= 0.95


def committed():
    """Return the rows of the committed table by name."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    return {row["name"]: row for row in rows}


def table():
    """Write the table and its page from what has run, committed rows for the rest."""
    rows, known = [], committed()
    for name, members in sorted(families().items()):
        file = OUT / f"{name}.json"
        row = json.loads(file.read_text()) if file.exists() else known.get(name)
        row = row or {"name": name, "outcome": "not run"}
        rows.append(row | {"stands_for": members})
    versions = {m.__name__: m.__version__ for m in (torch, timm, torchvision)}
    data = {"command": "python tests/sweep.py run", "versions": versions, "rows": rows}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    (ROOT / "docs" / "zoo.md").write_text(page(rows, versions))


def page(rows, versions):
    ran = sum(len(row["stands_for"]) for row in rows)
    by = collections.Counter()
    for row in rows:
        by[row["outcome"].removeprefix("failed: ")] += len(row["stands_for"])
    shares = [row["saved"] / row["possible"] for row in rows if (row.get("possible") or 0) > LITTLE]
    lines = [
        "# The zoo",
        "",
        "Every family of architectures, half of its channels closed at random: wrapped, trained",
        "a step, pruned, compared. `python tests/sweep.py run`, then `table`, makes this page; a",
        "family is run by its smallest member.",
        "for: how many architectures a row stands for, named at the end. input: one image, clip or",
        "pair. From 12 million parameters on, runs of blocks that are alike are shortened to two,",
        "to save hours. fp64: largest relative difference behind pruning.",
        "saved of possible: work saved, of the most that an independent probe finds could",
        "be; empty where it was not run, and above 1 where it finds less than there is (it takes",
        "what varies for needed).",
        "way: whether torch.fx alone followed the forward (graph), the sizes of an example decided",
        "(sizes), or parts were pruned inside their own Python (parts). code: the commit that was",
        "run; rows without one are older, and have no way.",
        "A failed verification is a refusal: nothing wrong was returned. In fp32 it mostly means",
        "that the random network differs from itself by as much. Versions: "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        f"{len(rows)} families, which stand for {ran} of {len(names())} architectures: "
        + ", ".join(f"{count} {outcome}" for outcome, count in by.most_common())
        + ".",
        "",
    ]
    if shares:
        low = sum(share < 0.95 for share in shares)
        lines += [
            f"The median family saves {statistics.median(shares):.3f} of the multiply-accumulates "
            f"that could be saved; {low} of {len(shares)} families save less than 0.95.",
            "",
        ]
    lines += ["| model | for | input | outcome | fp64 | saved of possible | way | prune s | code "
              "| kept whole |"]  # fmt: skip
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        name = row["name"]
        if row.get("left_out"):
            name += f" (without {row['left_out']} repeated blocks)"
        if row.get("settings"):
            name += f" ({row['settings']})"
        share = f"{row['saved'] / row['possible']:.3f}" if row.get("possible") else ""
        if row.get("possible") and row["possible"] < LITTLE:
            share = f"{row['possible']:.1e} possible"
        fp64 = f"{row['fp64']:.0e}" if "fp64" in row else ""
        why = "; ".join(row.get("kept", [])) or row.get("why", "")
        if not why and row.get("possible") and row["saved"] < 0.95 * row["possible"]:
            unknown = "not explained; the bound is from 64 images at most"
            why = EXPLAINED.get(row["name"], unknown)
            if row.get("constant", 0) > 0.02:
                why = f"{100 * row['constant']:.0f} % of what is left is constant, and read in sums"
            elif row.get("awake") and row["saved"] >= 0.95 * row["awake"]:
                without = row["saved"] / row["awake"]
                why = f"{without:.3f} if no activation were at rest for all images of the probe"
        size = ", ".join("×".join(map(str, shape[1:])) for shape in row.get("input", []))
        cells = [name, len(row["stands_for"]), size, row["outcome"], fp64, share]
        cells += [row.get("way", ""), row.get("seconds_prune", ""), row.get("code", "")]
        cells += [why.replace("|", "/")[:160]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "## Who stands for whom", ""]
    for row in rows:
        others = [name for name in row["stands_for"] if name != row["name"]]
        if others:
            lines.append(f"- {row['name']}: {', '.join(others)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    {"run": run, "one": child, "table": table}[sys.argv[1]](*sys.argv[2:])
