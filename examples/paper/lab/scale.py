"""The settings of a scale, from its TOML file, and the command line every script has."""

import argparse
import copy
import tomllib
from pathlib import Path
from typing import Any

import torch

from prifu_plugin.baselines import Schedule

HERE = Path(__file__).resolve().parent.parent
ROOT = HERE.parent.parent


class Scale:
    """The settings of one scale.

    Attributes:
        name: "cpu", "paper" or "smoke".
        values: what the file says.
        folder: of the data sets' official files.
        results: where tables and pictures are written.
        committed: the one file of stored runs.
        device: where networks are trained and attacked.
    """

    def __init__(
        self, name: str, folder: str = "data", out: str = "", device: str | torch.device = "cpu"
    ) -> None:
        self.name = name
        self.device = torch.device(device)
        self.folder = Path(folder)
        kept = ROOT / "docs" / "results" / "paper"
        self.results = ROOT / "out" / "paper" / "smoke" if name == "smoke" else kept
        self.committed = self.results / f"runs-{name}.json"
        self.results = Path(out) if out else self.results
        self.results.mkdir(parents=True, exist_ok=True)
        file = HERE / ("paper.toml" if name == "paper" else "cpu.toml")
        self.values: dict[str, Any] = tomllib.loads(file.read_text())
        if name == "smoke":
            self.values |= {"seeds": [0], "attack_seeds": 1, "suite": "quick", "cuts": ["pooled"]}
            self.values |= {"queries": 2, "decoders": [], "private": 2}
            self.values["schedule"] |= {"epochs": 1, "finishing": 5}
            self.values["sizes"] |= {"digits": [320, 200, 100], "faces": [320, 200, 100]}
            self.values["networks"]["backbones"] = ["resnet", "vgg"]
            self.values["sweep"] = {"alphas": [0.1, 0.6], "doses": [0.0, 2.6]}
            self.values["correlated"]["pairs"] = [["cheekbones", 0.8]]
            self.values["networks"]["pretrained"] = ["pretrained-resnet"]
            self.values["finetune"]["pretraining"] = {"images": 640, "epochs": 1}
            self.values["finetune"]["schedule"] = self.values["schedule"]
            self.values["finetune"]["sizes"] = self.values["sizes"]
            self.values["finetune"]["filter"] = self.values["filter"] | {"dose": 1.0}
        if self.values["threads"]:
            torch.set_num_threads(self.values["threads"])

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def replaced(self, section: str) -> "Scale":
        """Return this scale with the settings of a section in place of its own."""
        other = copy.copy(self)
        other.values = self.values | self.values[section]
        return other

    @property
    def schedule(self) -> Schedule:
        """How every method is trained."""
        return Schedule(**self.values["schedule"])


def scale_from_command_line(description: str | None) -> tuple[Scale, bool]:
    """Return the scale that was asked for, and whether only to redraw from cached runs."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--scale", choices=["cpu", "paper"], default="cpu")
    parser.add_argument("--smoke", action="store_true", help="a minute's run on few images")
    parser.add_argument("--data", default="data", help="folder of the official files")
    parser.add_argument("--out", default="", help="folder of pages and pictures")
    parser.add_argument("--cached", action="store_true", help="draw from the committed runs")
    parser.add_argument("--device", default="", help="cpu, cuda, ...; what there is by default")
    arguments = parser.parse_args()
    name = "smoke" if arguments.smoke else arguments.scale
    fast = torch.accelerator.is_available() and name == "paper"
    found = str(torch.accelerator.current_accelerator()) if fast else "cpu"
    scale = Scale(name, arguments.data, arguments.out, arguments.device or found)
    return scale, arguments.cached
