"""Chips by name, and the bandwidth along a mesh axis against counts of links by hand."""

from typing import NamedTuple

import numpy as np
import pytest

from emo_jax.errors import UserError
from emo_jax.parallel.chips import CHIPS, peak_flops
from emo_jax.planning.topology import offered, parse_topology, wires


class Device(NamedTuple):
    coords: tuple[int, int, int]
    slice_index: int = 0


def mesh_of(devices, sizes: tuple[int, int, int, int]) -> np.ndarray:
    made = np.empty(sizes, object)
    made.reshape(-1)[:] = devices
    return made


def cube(x: int, y: int, z: int) -> list[Device]:
    return [Device((i, j, k)) for i in range(x) for j in range(y) for k in range(z)]


def test_names_say_which_chips_and_how_many():
    v5p = parse_topology("v5p:4x4x8")
    assert (v5p.chips, v5p.devices, v5p.compiles) == (128, 128, True)
    assert parse_topology("tpu7x:4x4x4").devices == 128, "two devices a chip"
    assert parse_topology("v6e:16x16", slices=4).chips == 1024
    gpus = parse_topology("h200:64")
    assert (gpus.chips, gpus.compiles) == (64, False)


@pytest.mark.parametrize(
    ("name", "slices", "words"),
    [
        ("v9:2x2", 1, "'v9'.*v4, v5e, v5p"),
        ("trillium:8x8", 1, "did you mean v6e"),
        ("v5p:3x3x3", 1, "nearest is v5p:2x4x4"),
        ("v5e:32x32", 1, "v5e:16x16 --slices=4"),
        ("v5p", 1, "as in v5p:4x4x4"),
        ("v5e:8by8", 1, "as in v5e:4x4"),
        ("h100:12", 1, "nearest is h100:16"),
        ("h100:8", 2, "--slices=2 is for TPUs"),
        ("v5p:4x4x4", 0, "--slices=0"),
    ],
)
def test_other_names_are_answered_with_the_nearest(name, slices, words):
    with pytest.raises(UserError, match=words):
        parse_topology(name, slices)


def test_every_slice_that_is_offered_can_be_named_and_none_is_larger_than_a_pod():
    for kind, chip in CHIPS.items():
        counts = [topology.chips for topology in offered(kind)]
        assert counts == sorted(counts)
        assert not chip.torus or counts[-1] <= chip.largest


def test_a_whole_closed_dimension_has_two_links_and_part_of_one_has_one():
    topology = parse_topology("v5p:4x4x4")
    link = topology.chip.link
    sizes = {"data": 1, "fsdp": 16, "expert": 4, "context": 1}
    mesh = mesh_of(cube(4, 4, 4), (1, 16, 4, 1))  # expert along z, fsdp along x and y
    assert wires(topology, mesh, sizes, ("expert",)).ring == 2 * link
    assert wires(topology, mesh, sizes, ("fsdp",)).ring == 4 * link
    # Half of a ring of 4 sends half of its bytes over the two links in the middle: 2 · 1/2 = 1 device's over 2.
    assert wires(topology, mesh, sizes, ("expert",)).cross == 2 * link
    sizes = {"data": 1, "fsdp": 32, "expert": 2, "context": 1}
    mesh = mesh_of(cube(4, 4, 4), (1, 32, 2, 1))
    assert wires(topology, mesh, sizes, ("expert",)).ring == link


def test_a_slice_of_a_flat_torus_is_open_below_sixteen():
    sizes = {"data": 1, "fsdp": 8, "expert": 8, "context": 1}
    mesh = mesh_of(cube(8, 8, 1), (1, 8, 8, 1))
    topology = parse_topology("v6e:8x8")
    link = topology.chip.link
    assert wires(topology, mesh, sizes, ("expert",)).ring == link
    # 4 devices send half of their bytes over one link: each has link / 2.
    assert wires(topology, mesh, sizes, ("expert",)).cross == link / 2


def test_slices_and_nodes_are_joined_by_the_network():
    topology = parse_topology("v6e:2x2", slices=2)
    devices = [Device(device.coords, slice_index) for slice_index in (0, 1) for device in cube(2, 2, 1)]
    sizes = {"data": 2, "fsdp": 4, "expert": 1, "context": 1}
    mesh = mesh_of(devices, (2, 4, 1, 1))
    assert wires(topology, mesh, sizes, ("data",)).ring == topology.chip.network
    gpus = parse_topology("h100:16")
    sizes = {"data": 1, "fsdp": 4, "expert": 4, "context": 1}
    assert wires(gpus, None, sizes, ("expert",)).ring == gpus.chip.link, "four within a node"
    assert wires(gpus, None, sizes, ("fsdp",)).ring == gpus.chip.network


def test_a_device_that_is_half_a_chip_has_half_of_its_peak():
    assert peak_flops("TPU7x") == CHIPS["tpu7x"].flops / 2
    assert peak_flops("TPU v5 lite") == CHIPS["v5e"].flops
    assert peak_flops("cpu") is None
