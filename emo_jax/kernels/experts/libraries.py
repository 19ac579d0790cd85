"""Products of groups of rows with their experts' weights, from libraries.

Letters: M rows in expert order, R routed experts, D width, F expert hidden.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from emo_jax.errors import UserError

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(x_MD, w_RDF, counts_R) → [M, F]; rows beyond the counts hold anything."""

MEGABLOX_ROWS = 512
MEGABLOX_COLUMNS = 1024
"""Most of a tile's rows, and of its columns and depth: the largest that compiled for every generation of TPU."""


def _tiling(rows: int, depth: int, columns: int) -> tuple[int, int, int]:
    """Tiles for this chip: columns in two parts where two cores share the work."""
    parts = pltpu.get_tpu_info().num_cores
    return min(MEGABLOX_ROWS, rows), min(MEGABLOX_COLUMNS, depth), min(MEGABLOX_COLUMNS, max(columns // parts, 128))


def megablox(x_MD: jax.Array, w_RDF: jax.Array, counts_R: jax.Array) -> jax.Array:
    """JAX's kernel for TPU. Rows are filled up to whole tiles."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    spare = -len(x_MD) % (MEGABLOX_ROWS if len(x_MD) > MEGABLOX_ROWS else 128)
    filled_MD = jnp.pad(x_MD, ((0, spare), (0, 0))) if spare else x_MD
    return gmm(filled_MD, w_RDF, counts_R, x_MD.dtype, _tiling)[: len(x_MD)]


def tokamax(x_MD: jax.Array, w_RDF: jax.Array, counts_R: jax.Array) -> jax.Array:
    """Tokamax's choice of kernel, by its own tables of tuned sizes where it has them.

    Raises:
      UserError: where it is not installed.
    """
    try:
        import tokamax as library
    except ImportError as error:
        raise UserError("implementation='tokamax' needs the package tokamax: pip install 'emo_jax[tokamax]'") from error
    return library.ragged_dot(x_MD, w_RDF, group_sizes=counts_R, preferred_element_type=x_MD.dtype)


PRODUCTS: dict[str, Product] = {
    "ragged": jax.lax.ragged_dot,
    "megablox": megablox,
    "tokamax": tokamax,
}
"""By the name of the implementation."""
