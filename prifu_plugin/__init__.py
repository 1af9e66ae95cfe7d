"""PriFU as a plugin: filter what a task does not need, then prune it away exactly."""

from importlib.metadata import version

from prifu_plugin.audit.data import AuditData as AuditData
from prifu_plugin.audit.over_seeds import OverSeeds as OverSeeds
from prifu_plugin.audit.over_seeds import over_seeds as over_seeds
from prifu_plugin.audit.result import AuditReport as AuditReport
from prifu_plugin.audit.run import audit as audit
from prifu_plugin.config import FilterConfig as FilterConfig
from prifu_plugin.cut import CutFilter as CutFilter
from prifu_plugin.decay import dose_to_beta as dose_to_beta
from prifu_plugin.errors import CaptureError as CaptureError
from prifu_plugin.errors import ConfigError as ConfigError
from prifu_plugin.errors import FilterError as FilterError
from prifu_plugin.errors import NoSiteError as NoSiteError
from prifu_plugin.errors import OrderError as OrderError
from prifu_plugin.errors import PrifuError as PrifuError
from prifu_plugin.errors import PrifuWarning as PrifuWarning
from prifu_plugin.errors import VerificationError as VerificationError
from prifu_plugin.filter import PriFU as PriFU
from prifu_plugin.graph.absorb import absorb as absorb
from prifu_plugin.graph.capture import register_leaf as register_leaf
from prifu_plugin.graph.insert import filters as filters
from prifu_plugin.graph.insert import unwrap as unwrap
from prifu_plugin.graph.insert import wrap as wrap
from prifu_plugin.graph.norms import register_norm as register_norm
from prifu_plugin.graph.sites import Site as Site
from prifu_plugin.graph.sites import sites as sites
from prifu_plugin.graph.summary import Summary as Summary
from prifu_plugin.graph.summary import summary as summary
from prifu_plugin.learned import learned as learned
from prifu_plugin.prune.elementwise import register_pointwise as register_pointwise
from prifu_plugin.prune.fastest import Fastest as Fastest
from prifu_plugin.prune.fastest import fastest as fastest
from prifu_plugin.prune.plan import Plan as Plan
from prifu_plugin.prune.report import PruneReport as PruneReport
from prifu_plugin.prune.run import plan_of as plan
from prifu_plugin.prune.run import prune as prune
from prifu_plugin.prune.run import rebuild as rebuild
from prifu_plugin.prune.run import report as report
from prifu_plugin.recalibration import recalibrate as recalibrate
from prifu_plugin.relevance import Relevance as Relevance
from prifu_plugin.relevance import influence as influence
from prifu_plugin.relevance import relevance as relevance
from prifu_plugin.schedule import FilterSchedule as FilterSchedule
from prifu_plugin.split import Split as Split
from prifu_plugin.split import cut_points as cut_points
from prifu_plugin.split import split as split
from prifu_plugin.status import MaskHistory as MaskHistory
from prifu_plugin.status import status as status
from prifu_plugin.threshold import Threshold as Threshold
from prifu_plugin.threshold import fit_alpha as fit_alpha
from prifu_plugin.threshold import sweep as sweep

__version__ = version("prifu_plugin")

__all__ = [
    "AuditData",
    "AuditReport",
    "CaptureError",
    "ConfigError",
    "CutFilter",
    "Fastest",
    "FilterConfig",
    "FilterError",
    "FilterSchedule",
    "MaskHistory",
    "NoSiteError",
    "OrderError",
    "OverSeeds",
    "Plan",
    "PriFU",
    "PrifuError",
    "PrifuWarning",
    "PruneReport",
    "Relevance",
    "Site",
    "Split",
    "Summary",
    "Threshold",
    "VerificationError",
    "__version__",
    "absorb",
    "audit",
    "cut_points",
    "dose_to_beta",
    "fastest",
    "filters",
    "fit_alpha",
    "influence",
    "learned",
    "over_seeds",
    "plan",
    "prune",
    "rebuild",
    "recalibrate",
    "register_leaf",
    "register_norm",
    "register_pointwise",
    "relevance",
    "report",
    "sites",
    "split",
    "status",
    "summary",
    "sweep",
    "unwrap",
    "wrap",
]
