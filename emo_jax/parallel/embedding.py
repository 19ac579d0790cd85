"""The embedding's rows of each device's own tokens, from a table that is split by width.

Letters: B rows, S sequence, T tokens of a device, D width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from emo_jax.parallel.sharding import WIDTH_AXES, map_tokens, width_axes


def lookup(table_VD: jax.Array, tokens_BS: jax.Array, dtype: Any, mesh: Mesh | None = None) -> jax.Array:
    """table[tokens] as `dtype`, [B, S, D]; the table's gradient is summed in its own precision.

    Left to the compiler, a table split by width is gathered in the precision that it rests in, and its gradient is
    added up whole on every device.
    """
    axes = width_axes(mesh, table_VD.shape[1]) if mesh is not None and mesh.size > 1 else ()
    rows = map_tokens(
        functools.partial(_rows, axes, jnp.dtype(dtype)), mesh, token_args=1, weights=[PartitionSpec(None, axes or None)]
    )
    return rows(tokens_BS, table_VD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows(axes: tuple[str, ...], dtype: jnp.dtype, tokens_BS: jax.Array, table_VD: jax.Array) -> jax.Array:
    table_VD = table_VD.astype(dtype)
    if axes:
        table_VD = jax.lax.all_gather(table_VD, axes, axis=1, tiled=True)
    return table_VD[tokens_BS]


def _rows_fwd(axes: tuple[str, ...], dtype: jnp.dtype, tokens_BS: jax.Array, table_VD: jax.Array) -> tuple:
    return _rows(axes, dtype, tokens_BS, table_VD), (tokens_BS, table_VD[:, :0])


def _rows_bwd(axes: tuple[str, ...], dtype: jnp.dtype, saved: tuple, g_BSD: jax.Array) -> tuple[Any, jax.Array]:
    tokens_BS, table_V0 = saved
    zeros_VD = jnp.zeros((len(table_V0), g_BSD.shape[-1]), table_V0.dtype)
    g_VD = zeros_VD.at[tokens_BS].add(g_BSD.astype(table_V0.dtype))
    if axes:
        g_VD = jax.lax.psum_scatter(g_VD, axes, scatter_dimension=1, tiled=True)
    return np.zeros(tokens_BS.shape, jax.dtypes.float0), g_VD


_rows.defvjp(_rows_fwd, _rows_bwd)
