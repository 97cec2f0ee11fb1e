"""Meshes: ParaAttention's arithmetic, and reading one, without a process group or with torch's fake one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from paracompile.errors import OptionError, ParacompileError
from paracompile.mesh import AXES, Axis, Ranks, init_mesh, mesh_shape
from paracompile.runtime.agreement import Agreement

pytestmark = pytest.mark.whole


@pytest.fixture
def world() -> Iterator[Callable[[int, int], None]]:
    """Start a process group of `size` ranks, of which this process is one and the others do not exist."""
    if dist.is_initialized():
        pytest.skip("this process has a process group")

    def start(size: int, rank: int = 0) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "size, batch, ring, ulysses, shape",
    [
        (8, None, None, None, (1, 1, 8)),
        (8, 2, None, None, (2, 1, 4)),
        (8, 2, 2, None, (2, 2, 2)),
        (8, None, 2, None, (1, 2, 4)),
        (8, None, 3, None, (1, 1, 8)),
        (8, None, None, 2, (1, 4, 2)),
        (8, 2, None, 8, (2, 1, 4)),
        (8, None, 4, 2, (1, 4, 2)),
        (8, 2, 2, 2, (2, 2, 2)),
        (8, 2, 64, 2, (2, 2, 2)),
        (6, 4, None, None, (2, 1, 3)),
        (1, 2, 2, 2, (1, 1, 1)),
    ],
)
def test_shape(size: int, batch: int | None, ring: int | None, ulysses: int | None, shape: tuple[int, ...]) -> None:
    assert mesh_shape(size, max_batch_dim_size=batch, max_ring_dim_size=ring, max_ulysses_dim_size=ulysses) == shape


def test_shapes_that_leave_ranks_out() -> None:
    with pytest.raises(OptionError, match=r"ring 1 x ulysses 2 leaves some of the 8 ranks without a place"):
        mesh_shape(8, max_ring_dim_size=1, max_ulysses_dim_size=2)


@pytest.mark.parametrize("key", ["max_batch_dim_size", "max_ring_dim_size", "max_ulysses_dim_size"])
@pytest.mark.parametrize("value", [0, -2, True, 2.0, "2"])
def test_sizes_below_one_and_other_types(key: str, value: object) -> None:
    with pytest.raises(OptionError, match=key):
        mesh_shape(4, **{key: value})  # type: ignore[arg-type]


def test_init_mesh(world: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ParacompileError, match="torchrun"):
        init_mesh("cpu")
    world(4, 3)
    mesh = init_mesh("cpu", max_batch_dim_size=2)
    assert mesh.mesh_dim_names == AXES
    assert mesh.mesh.tolist() == [[[0, 1]], [[2, 3]]]


def test_simulated_covers_every_place_once() -> None:
    places = [Ranks.simulated(ulysses=2, ring=3, batch=2, rank=rank) for rank in range(12)]
    assert [(r.batch.rank, r.ring.rank, r.ulysses.rank) for r in places] == list(
        itertools.product(range(2), range(3), range(2))
    )
    assert [r.sequence_rank for r in places] == [0, 1, 2, 3, 4, 5] * 2
    assert (places[0].size, places[0].sequence_size, places[0].is_single) == (12, 6, False)
    assert (places[0].ulysses.group, places[0].ring.group, places[0].batch.group) == ("ulysses", "ring", "batch")
    assert Ranks.simulated().is_single
    for wrong in ({"ulysses": 0}, {"rank": 1}, {"ulysses": 2, "rank": -1}):
        with pytest.raises(OptionError):
            Ranks.simulated(**wrong)


def test_without_a_process_group_there_is_one_rank() -> None:
    ranks = Ranks.from_mesh(None)
    assert ranks.is_single
    assert ranks.members == ()


def test_the_world_is_one_ulysses_axis(world: Callable[[int, int], None]) -> None:
    world(4, 2)
    ranks = Ranks.from_mesh(None)
    assert dist.group.WORLD is not None
    assert ranks.ulysses == Axis("ulysses", 4, 2, dist.group.WORLD.group_name)
    assert (ranks.ring.size, ranks.batch.size, ranks.sequence_rank, ranks.members) == (1, 1, 2, (0, 1, 2, 3))
    # Under the fake backend nobody answers, and nobody is waited for.
    Agreement(ranks.members, timeout=1).exchange("plan", facts={"graph": ""})


def test_named_meshes(world: Callable[[int, int], None]) -> None:
    world(4, 3)
    mesh = init_mesh("cpu")
    ranks = Ranks.from_mesh(mesh)
    assert ranks.ulysses == Axis("ulysses", 4, 3, mesh.get_group("ulysses").group_name)
    assert (ranks.ring.size, ranks.batch.size, ranks.size, ranks.members) == (1, 1, 4, (0, 1, 2, 3))
    unnamed = Ranks.from_mesh(init_device_mesh("cpu", (4,)))
    assert (unnamed.ulysses.name, unnamed.ulysses.size) == ("ulysses", 4)
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ulysses"))
    part = Ranks.from_mesh(two["ulysses"])
    assert (part.ulysses.size, part.ulysses.rank, part.members) == (2, 1, (2, 3))
    other = Ranks.from_mesh(init_device_mesh("cpu", (4,), mesh_dim_names=("context",)))
    assert (other.ulysses.size, other.members) == (4, (0, 1, 2, 3))
    as_one = Ranks.from_mesh(two._flatten("model"))
    assert (as_one.ulysses.size, as_one.ulysses.rank, as_one.members) == (4, 3, (0, 1, 2, 3))
    assert as_one.group == as_one.sequence_group == as_one.ulysses.group != ""
    spare = init_device_mesh("cpu", (4, 1), mesh_dim_names=("ulysses", "data"))
    assert Ranks.from_mesh(spare).members == (0, 1, 2, 3)


def test_two_axes_share_a_sequence(world: Callable[[int, int], None]) -> None:
    world(4, 1)
    mesh = init_mesh("cpu", max_ring_dim_size=2)
    ranks = Ranks.from_mesh(mesh)
    assert (ranks.ring.size, ranks.ulysses.size, ranks.sequence.size, ranks.sequence.rank) == (2, 2, 4, 1)
    assert ranks.members == (0, 1, 2, 3)
    assert ranks.sequence_group == ranks.group != ranks.ulysses.group
    assert Ranks.from_mesh(mesh) == ranks  # read again, no new groups


def test_the_batch_axis_is_no_part_of_the_sequence(world: Callable[[int, int], None]) -> None:
    world(4, 3)
    ranks = Ranks.from_mesh(init_mesh("cpu", max_batch_dim_size=2))
    assert (ranks.batch.rank, ranks.sequence.size, ranks.sequence.rank) == (1, 2, 1)
    assert ranks.sequence_group == ranks.ulysses.group != ranks.group


def test_meshes_that_are_refused(world: Callable[[int, int], None]) -> None:
    world(4, 1)
    with pytest.raises(OptionError, match="in the order"):
        Ranks.from_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("ulysses", "ring")))
    with pytest.raises(OptionError, match=r"'data', 'model'.*\"batch\", \"ring\", \"ulysses\""):
        Ranks.from_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model")))
    with pytest.raises(OptionError, match=r"does not shard over: 'data'.*mesh\['ulysses'\]"):
        Ranks.from_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ulysses")))
    with pytest.raises(OptionError, match="no names"):
        Ranks.from_mesh(init_device_mesh("cpu", (2, 2)))
    with pytest.raises(OptionError, match="rank 1 is not in it"):
        Ranks.from_mesh(DeviceMesh("cpu", [0, 2], mesh_dim_names=("ulysses",)))
