"""PriFU as a plugin: filter what a task does not need, then prune it away exactly."""

from prifu_plugin.config import FilterConfig as FilterConfig
from prifu_plugin.cut import CutFilter as CutFilter
from prifu_plugin.decay import dose_to_beta as dose_to_beta
from prifu_plugin.filter import PriFU as PriFU
from prifu_plugin.graph.insert import filters as filters
from prifu_plugin.graph.insert import unwrap as unwrap
from prifu_plugin.graph.insert import wrap as wrap
from prifu_plugin.graph.sites import Site as Site
from prifu_plugin.graph.sites import sites as sites
