"""The paper's seven rivals and the controls no comparison is fair without.

Every method takes a network cut by `prifu_plugin.split` and is a `Defence`: `step` trains it on a
batch, `encode` says what it uploads. `fit` trains any of them by one schedule.
"""

from prifu_plugin.baselines.base import Batch, Defence, TaskOnly
from prifu_plugin.baselines.bottleneck import Bottleneck
from prifu_plugin.baselines.cfb import CFB
from prifu_plugin.baselines.ci import CI
from prifu_plugin.baselines.disco import DISCO
from prifu_plugin.baselines.fit import Schedule, fit
from prifu_plugin.baselines.maxent_arl import MaxEntARL
from prifu_plugin.baselines.noise import TrainedNoise
from prifu_plugin.baselines.nopeek import NoPeekInfer
from prifu_plugin.baselines.pan import PAN
from prifu_plugin.baselines.ran import RAN
from prifu_plugin.baselines.removal import keep_channels, keep_directions
from prifu_plugin.baselines.shredder import Shredder
from prifu_plugin.baselines.slimming import NetworkSlimming
from prifu_plugin.baselines.tokens import tokens_as_maps
from prifu_plugin.baselines.vib import VIB

__all__ = [
    "CFB",
    "CI",
    "DISCO",
    "PAN",
    "RAN",
    "VIB",
    "Batch",
    "Bottleneck",
    "Defence",
    "MaxEntARL",
    "NetworkSlimming",
    "NoPeekInfer",
    "Schedule",
    "Shredder",
    "TaskOnly",
    "TrainedNoise",
    "fit",
    "keep_channels",
    "keep_directions",
    "tokens_as_maps",
]
