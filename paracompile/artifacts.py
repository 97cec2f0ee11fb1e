"""What was compiled, in a file: for other machines of the same kind, which then compile nothing.

    paracompile.save_compiled("model.compiled")     # after a first call, on each rank
    paracompile.load_compiled("model.compiled")     # before the first call, on as many ranks

It holds what Inductor's caches hold (`torch.compiler.save_cache_artifacts`), and who it is for. Code that does not fit
is never run: Inductor's caches are keyed by the graph, the settings and the version. What does not fit is refused all
the same, so that nobody waits for a long compile that was thought to be spared.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paracompile.errors import OptionError, ParacompileError
from paracompile.mesh import Ranks

__all__ = ["Compiled", "load_compiled", "note_compiled", "save_compiled"]

_MAGIC = b"paracompile 1\n"


@dataclass(frozen=True)
class Compiled:
    """What was compiled, whatever its sizes.

    attributes:
        model: the class of the module.
        weights: a digest of the shapes and types of its parameters and buffers.
        mesh: the sizes of the axes.
    """

    model: str
    weights: str
    mesh: tuple[int, int, int]

    @classmethod
    def of(cls, model: str, weights: Iterable[Tensor], ranks: Ranks) -> Compiled:
        """`model` as it is called, with its weights, shared by `ranks`."""
        looks = repr([(tuple(weight.shape), weight.dtype) for weight in weights])
        digest = hashlib.sha256(looks.encode()).hexdigest()[:16]
        return cls(model, digest, (ranks.batch.size, ranks.ring.size, ranks.ulysses.size))

    def __str__(self) -> str:
        return f"{self.model} (weights {self.weights}) on a mesh of {' x '.join(map(str, self.mesh))}"


_here: dict[Compiled, None] = {}
_loaded: dict[Compiled, str] = {}


def note_compiled(compiled: Compiled) -> None:
    """Told of each graph before it is compiled.

    Raises:
        ParacompileError: something was loaded, and it was not made for this model on this mesh.
    """
    _here[compiled] = None
    if _loaded and compiled not in _loaded:
        held = "; ".join(f"{each} from {path!r}" for each, path in _loaded.items())
        raise ParacompileError(
            f"load_compiled was called, and what it loaded is not for {compiled}, but for {held}. Save it anew with "
            "this model on this mesh, or leave out load_compiled"
        )


def save_compiled(path: str | os.PathLike[str]) -> None:
    """Writes what was compiled in this process to a file; each rank writes its own (`path`, then ".rank-1-of-2").

    Raises:
        ParacompileError: nothing was compiled by Inductor yet, or its caches are off.
    """
    saved = torch.compiler.save_cache_artifacts()
    if saved is None or not _here:
        raise ParacompileError(
            "save_compiled: there is nothing to save. Call the compiled model once before, and leave Inductor's caches "
            "on (fx_graph_cache, and TORCHINDUCTOR_FORCE_DISABLE_CACHES unset)"
        )
    header = json.dumps({"made by": _made_by(), "holds": [asdict(each) for each in _here]}).encode()
    file = _file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_MAGIC + struct.pack("<Q", len(header)) + header + saved[0])


def load_compiled(path: str | os.PathLike[str]) -> None:
    """Fills Inductor's caches from a file that `save_compiled` wrote; call it before the model's first call.

    Raises:
        OptionError: no such file, another one, or one made on as many ranks as there are not here.
        ParacompileError: it was made by another version or for another device. For another model or mesh it is raised
            when the model is compiled.
    """
    file = _file(path)
    if not file.is_file():
        others = sorted(other.name for other in Path(path).parent.glob(Path(path).name + "*"))
        raise OptionError("path", str(path), f"there is no file {file.name!r}" + (f", but {others}" if others else ""))
    content = file.read_bytes()
    if not content.startswith(_MAGIC):
        raise OptionError("path", str(path), "it is no file that save_compiled wrote")
    start = len(_MAGIC) + 8
    (length,) = struct.unpack("<Q", content[len(_MAGIC) : start])
    header: dict[str, Any] = json.loads(content[start : start + length])
    for name, here in _made_by().items():
        made = header["made by"].get(name)
        if made != here:
            raise ParacompileError(
                f"load_compiled: {str(path)!r} was made with {name} {made}, and here it is {here}. Save it anew here"
            )
    if torch.compiler.load_cache_artifacts(content[start + length :]) is None:
        raise ParacompileError(f"load_compiled: PyTorch does not take what is in {str(path)!r}. Save it anew here")
    for each in header["holds"]:
        _loaded[Compiled(each["model"], each["weights"], tuple(each["mesh"]))] = str(path)


def _made_by() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return {
        "paracompile": version("paracompile"),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "the device": device,
    }


def _file(path: str | os.PathLike[str]) -> Path:
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return Path(path) if ranks == 1 else Path(f"{os.fspath(path)}.rank-{dist.get_rank()}-of-{ranks}")
