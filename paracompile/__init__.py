"""A torch.compile backend that runs diffusion transformers on several GPUs.

`torch.compile(transformer, backend="paracompile", options={"mesh": mesh})`; see `paracompile.options.Options`.
"""

from paracompile.errors import GraphError, OptionError, ParacompileError, RankError
from paracompile.mesh import init_mesh
from paracompile.report.report import Report

__all__ = ["GraphError", "OptionError", "ParacompileError", "RankError", "Report", "init_mesh"]
