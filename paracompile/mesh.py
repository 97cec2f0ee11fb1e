"""Which ranks share the work, and how: the axes "batch", "ring" and "ulysses".

`init_mesh` builds the `DeviceMesh`; `Ranks` is what the rest of the package reads: three sizes, this rank's place on
each, and the names of the process groups. A `Ranks` can be made without any process group (`Ranks.simulated`), so that
every pass is a function of sizes and a rank.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from paracompile.errors import OptionError, ParacompileError
from paracompile.torch_private import flattened

__all__ = ["AXES", "Axis", "Ranks", "init_mesh", "mesh_shape"]

AXES = ("batch", "ring", "ulysses")
"""The axes' names, outermost first: neighbouring ranks differ in "ulysses", whose all-to-alls want the best links."""


def init_mesh(
    device_type: str,
    *,
    max_batch_dim_size: int | None = None,
    max_ring_dim_size: int | None = None,
    max_ulysses_dim_size: int | None = None,
) -> DeviceMesh:
    """Lay all ranks of the world out as a mesh of the axes ("batch", "ring", "ulysses").

    The arguments mean what they mean to ParaAttention's ``init_context_parallel_mesh``; see `mesh_shape`. Under
    torchrun the process group is made when there is none yet. A collective: every rank calls it.

    Args:
        device_type: "cuda", "cpu", ...: where the model's tensors live.

    Raises:
        OptionError: a size below 1, or sizes that do not make up the world.
        ParacompileError: no process group, and no torchrun to make one from.
    """
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise ParacompileError(
                "init_mesh needs torch.distributed: start the script with torchrun, or call "
                "torch.distributed.init_process_group first (a single process needs no mesh at all)"
            )
        world_size = int(os.environ["WORLD_SIZE"])
    else:
        world_size = dist.get_world_size()
    # Checked before anything is started, so that a wrong size leaves no half-made group behind.
    shape = mesh_shape(
        world_size,
        max_batch_dim_size=max_batch_dim_size,
        max_ring_dim_size=max_ring_dim_size,
        max_ulysses_dim_size=max_ulysses_dim_size,
    )
    return init_device_mesh(device_type, shape, mesh_dim_names=AXES)


def mesh_shape(
    world_size: int,
    *,
    max_batch_dim_size: int | None = None,
    max_ring_dim_size: int | None = None,
    max_ulysses_dim_size: int | None = None,
) -> tuple[int, int, int]:
    """The sizes (batch, ring, ulysses) for a world of `world_size` ranks; their product is `world_size`.

    "max" is ParaAttention's word: a size is the largest common divisor of what is wanted and what is left, so wanting 3
    on 4 ranks gives 1. The batch axis comes first (1 unless asked for). Of the rest, the axis that was named takes its
    part and the other takes what remains; with neither named all is ulysses. ParaAttention refuses both at once; here
    ulysses then comes before ring, and the two must make up the rest.

    Raises:
        OptionError: a size below 1 or not an integer; both sizes given that leave ranks without a place.
    """
    wanted: dict[str, object] = {
        "max_batch_dim_size": max_batch_dim_size,
        "max_ring_dim_size": max_ring_dim_size,
        "max_ulysses_dim_size": max_ulysses_dim_size,
    }
    for key, value in wanted.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(key, value, "give an integer of at least 1, or None")
    batch = 1 if max_batch_dim_size is None else math.gcd(world_size, max_batch_dim_size)
    rest = world_size // batch
    if max_ulysses_dim_size is None:
        ring = 1 if max_ring_dim_size is None else math.gcd(rest, max_ring_dim_size)
        ulysses = rest // ring
    else:
        ulysses = math.gcd(rest, max_ulysses_dim_size)
        left = rest // ulysses
        ring = left if max_ring_dim_size is None else math.gcd(left, max_ring_dim_size)
    if batch * ring * ulysses != world_size:
        raise OptionError(
            "max_ring_dim_size",
            max_ring_dim_size,
            f"batch {batch} x ring {ring} x ulysses {ulysses} leaves some of the {world_size} ranks without a place: "
            "leave out max_ring_dim_size or max_ulysses_dim_size, and that axis takes what remains",
        )
    return batch, ring, ulysses


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, seen from one rank."""

    name: str
    """ "ulysses", "ring" or "batch"."""
    size: int
    """Ranks along the axis, at least 1."""
    rank: int
    """This rank's place along it, 0 to size - 1."""
    group: str
    """The c10d name of this rank's group along the axis, as ``torch.ops._c10d_functional`` takes it; empty for an axis
    that the mesh does not have."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that share one model's work, seen from one of them."""

    ulysses: Axis
    ring: Axis
    batch: Axis
    sequence_group: str = ""
    """The c10d name of the group of the ring and the ulysses axis together, which share a sequence."""
    group: str = ""
    """The c10d name of the group of all ranks."""
    members: tuple[int, ...] = ()
    """The global ranks of the whole mesh in the order (batch, ring, ulysses); empty when simulated or single without a
    process group."""

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.batch.size * self.sequence_size

    @property
    def sequence_size(self) -> int:
        """Over how many ranks a sequence is cut: ring x ulysses."""
        return self.ring.size * self.ulysses.size

    @property
    def sequence_rank(self) -> int:
        """Which part of a sequence this rank holds, 0 to sequence_size - 1."""
        return self.ring.rank * self.ulysses.size + self.ulysses.rank

    @property
    def sequence(self) -> Axis:
        """The ring and the ulysses axis as one: the ranks that share a sequence."""
        return Axis("sequence", self.sequence_size, self.sequence_rank, self.sequence_group)

    @property
    def all(self) -> Axis:
        """All axes as one: the ranks that share an image."""
        return Axis("all", self.size, self.flat_rank, self.group)

    @property
    def flat_rank(self) -> int:
        """This rank's place in the whole mesh, in the order (batch, ring, ulysses)."""
        return self.batch.rank * self.sequence_size + self.sequence_rank

    @property
    def is_single(self) -> bool:
        """Nothing is shared: one rank."""
        return self.size == 1

    @classmethod
    def simulated(cls, *, ulysses: int = 1, ring: int = 1, batch: int = 1, rank: int = 0) -> Ranks:
        """The place of flat rank `rank` in a mesh that exists on paper only; groups are named after the axes.

        Raises:
            OptionError: a size below 1, or a rank outside the mesh.
        """
        for key, value in (("ulysses", ulysses), ("ring", ring), ("batch", batch)):
            if value < 1:
                raise OptionError(key, value, "an axis has at least 1 rank")
        if not 0 <= rank < batch * ring * ulysses:
            raise OptionError("rank", rank, f"give a rank from 0 to {batch * ring * ulysses - 1}")
        rest, at_ulysses = divmod(rank, ulysses)
        at_batch, at_ring = divmod(rest, ring)
        return cls(
            ulysses=Axis("ulysses", ulysses, at_ulysses, "ulysses"),
            ring=Axis("ring", ring, at_ring, "ring"),
            batch=Axis("batch", batch, at_batch, "batch"),
            sequence_group="sequence",
            group="all",
        )

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh | None) -> Ranks:
        """Read a mesh; None stands for all ranks of the world as one ulysses axis, or for a single process.

        The first time that a mesh is read, groups over several of its axes are made: a collective of its ranks.

        Raises:
            OptionError: a mesh whose axes are not understood, or that leaves this rank out.
        """
        return cls._from_world() if mesh is None else cls._from_axes(mesh)

    @classmethod
    def _from_world(cls) -> Ranks:
        if not dist.is_available() or not dist.is_initialized():
            return cls(ulysses=Axis("ulysses", 1, 0, ""), ring=Axis("ring", 1, 0, ""), batch=Axis("batch", 1, 0, ""))
        size = dist.get_world_size()
        group = dist.group.WORLD
        assert group is not None
        return cls(
            ulysses=Axis("ulysses", size, dist.get_rank(), group.group_name),
            ring=Axis("ring", 1, 0, ""),
            batch=Axis("batch", 1, 0, ""),
            sequence_group=group.group_name,
            group=group.group_name,
            members=tuple(range(size)),
        )

    @classmethod
    def _from_axes(cls, mesh: DeviceMesh) -> Ranks:
        takes = 'takes a mesh with any of the axes "batch", "ring", "ulysses", or one of a single dimension'
        names = mesh.mesh_dim_names
        if names is None:
            if mesh.ndim != 1:
                raise OptionError("mesh", mesh, f"{mesh.ndim} dimensions and no names: paracompile {takes}")
            names = ("ulysses",)
        elif mesh.ndim == 1 and names[0] not in AXES:  # another library's name for it, or that of axes made one
            names = ("ulysses",)
        if not set(names) & set(AXES):
            raise OptionError("mesh", mesh, f"axes {', '.join(map(repr, names))}: paracompile {takes}")
        extra = [name for dim, name in enumerate(names) if name not in AXES and mesh.size(dim) > 1]
        if extra:
            ours = tuple(name for name in names if name in AXES)
            raise OptionError(
                "mesh",
                mesh,
                f"axes that paracompile does not shard over: {', '.join(map(repr, extra))}. It {takes}: "
                f"give the part that is ours, mesh[{(ours[0] if len(ours) == 1 else ours)!r}]",
            )
        place = mesh.get_coordinate()
        if place is None:
            raise OptionError("mesh", mesh, f"rank {dist.get_rank()} is not in it: compile on the mesh's ranks only")
        axes = {name: Axis(name, 1, 0, "") for name in AXES}
        for dim, name in enumerate(names):
            if name in AXES:
                axes[name] = Axis(name, mesh.size(dim), place[dim], mesh.get_group(dim).group_name)
        ours = tuple(name for name in names if name in AXES and axes[name].size > 1)
        if ours != tuple(name for name in AXES if name in ours):
            raise OptionError("mesh", mesh, f"axes in the order {ours}: give them in the order {AXES}")
        sequence = tuple(name for name in ours if name != "batch")
        return cls(
            axes["ulysses"],
            axes["ring"],
            axes["batch"],
            sequence_group=_group_of(mesh, sequence),
            group=_group_of(mesh, ours),
            members=tuple(int(rank) for rank in mesh.mesh.flatten().tolist()),
        )


def _group_of(mesh: DeviceMesh, names: tuple[str, ...]) -> str:
    """The c10d name of the group over some of the mesh's axes."""
    if not names:
        return ""
    if mesh.ndim == 1:
        return mesh.get_group().group_name
    part = mesh[names[0] if len(names) == 1 else names]
    return (part if len(names) == 1 else flattened(part)).get_group().group_name
