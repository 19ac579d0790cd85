"""How products are cut on a TPU, so that what a kernel holds fits the fast memory of the chip that is compiled for.

Letters: Q rows a tile, R routed experts, C choices a token, D width, F expert hidden.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from emo_jax.kernels.experts.tpu_rows import IDS_FROM, LANES, pull_bytes


class Sizes(NamedTuple):
    """How the products are cut, and what of fast memory they may take.

    Attributes:
      rows: Q.
      hidden: columns of F at once, where F is a result's.
      width: columns of D at once, where D is a result's.
      vmem: bytes.
    """

    rows: int
    hidden: int
    width: int
    vmem: int


FEW_ROWS = 1024
"""Rows of an expert up to which tiles of 128 waste less than tiles of 256 gain: half of one is not filled."""
VMEM_SHARE = 0.9
"""Of a core's fast memory that blocks, sums and what the compiler keeps beside them may take."""


def best_sizes(choices: int, experts: int, taken: int, width: int, hidden: int, dtype: Any) -> Sizes | None:
    """Sizes for the chip that is compiled for: the fewest parts that fit it, one for each core at least.

    Args:
      choices: that have an expert, at most.
      experts: R.
      taken: C, choices of a token.
      width, hidden, dtype: D, F, and that of rows and weights.

    Returns:
      None where the kernels cannot take such experts.
    """
    each = 4 // jnp.dtype(dtype).itemsize if dtype in (jnp.bfloat16, jnp.float32) else 0
    if not each or width % (LANES * each) or hidden % LANES or taken > LANES - IDS_FROM:
        return None
    chip = pltpu.get_tpu_info()
    room = int(VMEM_SHARE * chip.vmem_capacity_bytes)
    if pull_bytes(taken, width // each) > room:
        return None
    found = []
    for q in (256, 128) if choices > FEW_ROWS * experts else (128,):
        hiddens = (f for f in _cuts(hidden, LANES, chip.num_cores) if _hidden_bytes(q, f, width, dtype) <= room)
        widths = (d for d in _cuts(width, LANES * each, chip.num_cores) if _width_bytes(q, hidden, d, dtype) <= room)
        f, d = next(hiddens, 0), next(widths, 0)
        if f and d:
            found.append(Sizes(q, f, d, room))
    # Each part reads all rows again, so few parts come before long tiles.
    return min(found, key=lambda sizes: hidden // sizes.hidden + width // sizes.width, default=None)


def _cuts(size: int, unit: int, cores: int) -> Iterator[int]:
    """Equal parts of a number of columns, in whole units, from the largest down: one for each core, if it can be."""
    units = size // unit
    parts = [count for count in range(1, units + 1) if units % count == 0]
    return (size // count for count in sorted(parts, key=lambda count: (count % cores != 0, count)))


def _hidden_bytes(q: int, f: int, width: int, dtype: Any) -> int:
    """Fast memory of the kernels that cut F: blocks twice, one at work while the other is on its way."""
    w = jnp.dtype(dtype).itemsize
    rows = q * (2 * (width * w + 4 * LANES) + 2 * width * w)
    forward = 2 * 2 * width * f * w + 2 * 3 * q * f * w + 5 * q * f * 4
    backward = 2 * width * f * w + 2 * 5 * q * f * w + 8 * q * f * 4
    weights = 2 * (2 * width * f * w + width * f * 4) + 2 * 2 * q * f * w + width * f * 4
    return rows + max(forward, backward, weights)


def _width_bytes(q: int, hidden: int, d: int, dtype: Any) -> int:
    """Fast memory of the kernel that cuts D."""
    w = jnp.dtype(dtype).itemsize
    return 2 * 2 * (q * hidden + hidden * d) * w + 2 * q * (d * w + 4 * LANES) + 3 * q * d * 4
