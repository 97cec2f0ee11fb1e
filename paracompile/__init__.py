"""A torch.compile backend that runs diffusion transformers on several GPUs.

`torch.compile(transformer, backend="paracompile", options={"mesh": mesh})`; see `paracompile.options.Options`.
"""

from paracompile.artifacts import load_compiled, save_compiled
from paracompile.cache import cache_context, cache_stats, reset_cache, set_rdt
from paracompile.errors import GraphError, OptionError, ParacompileError, RankError
from paracompile.mesh import init_mesh
from paracompile.patterns.rules import register_rule
from paracompile.pipelines import parallelize
from paracompile.report.cache_stats import CacheStats
from paracompile.report.report import Report
from paracompile.step_plans import magnitude_ratios, steps_by_magnitude

__all__ = [
    "CacheStats",
    "GraphError",
    "OptionError",
    "ParacompileError",
    "RankError",
    "Report",
    "cache_context",
    "cache_stats",
    "init_mesh",
    "load_compiled",
    "magnitude_ratios",
    "parallelize",
    "register_rule",
    "reset_cache",
    "save_compiled",
    "set_rdt",
    "steps_by_magnitude",
]
