"""What chips can do, from their makers' data sheets."""

from typing import NamedTuple

GB, GIB = 10**9, 2**30


class Chip(NamedTuple):
    """One accelerator.

    Attributes:
      kinds: JAX's names of its devices.
      flops: dense bfloat16 operations a second.
      memory: bytes of HBM that a program can have.
      bandwidth: bytes of HBM a second.
      link: bytes a second that one link to a neighbour carries, in each direction; on GPUs, what NVLink carries.
      torus: dimensions in which it has two neighbours; 0: a switch joins the chips of a node.
      wraps: a dimension of a torus closes into a ring where its length is a multiple of this.
      network: bytes a second out of it to other slices or nodes, in each direction.
      devices: JAX devices that it shows itself as, each with its share of everything.
      largest: chips of a whole pod, or of a node.
      host: chips of one host.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    link: float
    torus: int
    wraps: int
    network: float
    devices: int
    largest: int
    host: int


CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 30.75 * GIB, 1228 * GB, 50 * GB, 3, 4, 3.1 * GB, 1, 4096, 4),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819 * GB, 50 * GB, 2, 16, 3.1 * GB, 1, 256, 4),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95.73 * GIB, 2765 * GB, 100 * GB, 3, 4, 6.25 * GB, 1, 8960, 4),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 31.24 * GIB, 1638 * GB, 100 * GB, 2, 16, 12.5 * GB, 1, 256, 4),
    "tpu7x": Chip(("TPU7x",), 2307e12, 189.48 * GIB, 7380 * GB, 100 * GB, 3, 4, 12.5 * GB, 2, 9216, 4),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989e12, 80 * GB, 3350 * GB, 450 * GB, 0, 0, 50 * GB, 1, 8, 8),
    "h200": Chip(("NVIDIA H200",), 989e12, 141 * GB, 4800 * GB, 450 * GB, 0, 0, 50 * GB, 1, 8, 8),
}
"""By the name that a topology begins with, as in `v5p:4x4x4`. TPUs: Google Cloud's documentation of each version; a
link is the bandwidth that it gives a chip over its four or six ports and two directions, the network what it gives a
chip or, for v5e, a pod of 256 (v4, for which it gives none, as v5e). Memory as libtpu's compiler has it: up to 1.25 GiB
less than the chip's. GPUs: NVIDIA's data sheets (SXM), and one 400 Gb/s network card a GPU."""


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations a second of one JAX device; None where the kind is not known."""
    for chip in CHIPS.values():
        if device_kind in chip.kinds:
            return chip.flops / chip.devices
    return None
