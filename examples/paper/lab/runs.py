"""Runs: one method, trained and attacked once; its result is a JSON file that is never redone."""

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

import prifu_plugin as prifu
from lab.datasets import Study, load
from lab.methods import Deployed, deploy
from lab.scale import ROOT, Scale
from prifu_plugin.audit.result import AuditReport

Run = dict[str, Any]


def run_of(
    scale: Scale,
    method: str,
    seed: int,
    *,
    data: str = "",
    network: str = "",
    cut: str = "pooled",
    **settings: Any,
) -> Run:
    """Describe a run; the description is its identity."""
    return {
        "data": data or scale["data"],
        "network": network or scale["network"],
        "cut": cut,
        "method": method,
        "settings": settings,
        "seed": seed,
    }


def complete(runs: Iterable[Run], scale: Scale, *, cached: bool = False) -> list[dict[str, Any]]:
    """Return the results of runs, making those that are missing.

    Args:
        runs: what is asked for.
        scale: settings that all share.
        cached: return what is in the committed file and make nothing.
    """
    known = stored(scale, new=not cached)
    asked = {key_of(run, scale): run for run in runs}
    missing = {key: run for key, run in asked.items() if key not in known}
    if not cached:
        for key, run in tqdm(missing.items(), desc="runs", disable=None):
            known[key] = _make(run, scale)
            stored_file(scale, key).write_text(json.dumps(known[key]))
    return [known[key] for key in asked if key in known]


def key_of(run: Run, scale: Scale) -> str:
    """Return the name of a run's result: a digest of all that could change it."""
    shared = ("schedule", "filter", "sizes", "suite", "attack_seeds", "queries", "decoders")
    content = json.dumps([run, {name: scale[name] for name in shared}], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def stored(scale: Scale, *, new: bool = True) -> dict[str, Any]:
    """Read the results there are: the committed ones, and those made since."""
    found: dict[str, Any] = {}
    if scale.committed.exists():
        found = json.loads(scale.committed.read_text())["runs"]
    for file in sorted(stored_file(scale, "x").parent.glob("*.json")) if new else ():
        found[file.stem] = json.loads(file.read_text())
    return found


def collect(scale: Scale) -> Path:
    """Write all results into the one file that is committed."""
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    data = {"scale": scale.values, "versions": versions, "runs": stored(scale)}
    scale.committed.write_text(json.dumps(data, indent=0, sort_keys=True) + "\n")
    return scale.committed


def packed(outcomes: torch.Tensor, seeds: int = 1) -> str:
    """Write how often attacks were right, by test item, as text."""
    counts = (outcomes * seeds).round().to(torch.uint8).numpy().tobytes()
    return base64.b85encode(zlib.compress(counts, 9)).decode()


def unpacked(text: str, seeds: int = 1) -> torch.Tensor:
    """Read what `packed` wrote."""
    counts = zlib.decompress(base64.b85decode(text))
    return torch.frombuffer(bytearray(counts), dtype=torch.uint8).double() / seeds


def stored_file(scale: Scale, key: str) -> Path:
    """Return where the result of a run is kept."""
    folder = ROOT / "out" / "paper" / "runs" / scale.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key}.json"


def _make(run: Run, scale: Scale) -> dict[str, Any]:
    study = load(run["data"], scale)
    start = time.perf_counter()
    deployed = deploy(run, study, scale)
    trained = time.perf_counter()
    report = _audit(run, scale, deployed, study)
    outcomes = {
        row.name: {
            "once": packed(row.once_right, scale["attack_seeds"]),
            "strongest": packed(row.right, scale["attack_seeds"]),
            "floor": packed(row.floor_right),
        }
        for row in report.attributes
    }
    result = {
        "run": run,
        "report": report.to_dict(),
        "outcomes": outcomes,
        "seconds": [round(trained - start), round(time.perf_counter() - trained)],
    }
    if run["method"] == "PriFU":
        units = prifu.filters(deployed.model).values()
        result["open"] = [sum(int(u.open.sum()) for u in units), sum(len(u.open) for u in units)]
    return result


def _audit(run: Run, scale: Scale, deployed: Deployed, study: Study) -> AuditReport:
    first = _first(run, scale)
    references = {}
    if key_of(first, scale) != key_of(run, scale):  # images are attacked once, in the first run
        data = complete([first], scale)[0]["report"]
        references["input"] = AuditReport.from_json(json.dumps(data))
    return prifu.audit(
        deployed.edge,
        study.attack,
        study.test,
        task=study.task,
        attributes=list(study.private),
        cloud=deployed.cloud,
        channel=deployed.channel,
        references=references,
        suite=scale["suite"],
        seeds=scale["attack_seeds"],
        queries=scale["queries"],
        reconstruct=scale["decoders"],
        name=run["method"],
    )


def _first(run: Run, scale: Scale) -> Run:
    """Return the run that every other on the same data refers to."""
    return run_of(scale, "plain", scale["seeds"][0], data=run["data"])
