"""The embedding's rows of each device's own tokens, from a table that rests in pieces.

Letters: B rows, S sequence, T tokens of a device, D width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from emo_jax.parallel.sharding import map_tokens, rest_spec, scattered, whole


def lookup(table_VD: jax.Array, tokens_BS: jax.Array, dtype: Any, mesh: Mesh | None = None) -> jax.Array:
    """table[tokens] as `dtype`, [B, S, D]; the table's gradient is summed in its own precision.

    Left to the compiler, a table that rests in pieces is gathered in the precision that it rests in, and its gradient
    is added up whole on every device.
    """
    spec = rest_spec(mesh, ("vocab", "embed"), table_VD.shape)
    rows = functools.partial(_rows, spec, jnp.dtype(dtype), len(table_VD))
    return map_tokens(rows, mesh, token_args=1, weights=[spec])(tokens_BS, table_VD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rows(spec: PartitionSpec, dtype: jnp.dtype, vocabulary: int, tokens_BS: jax.Array, table_VD: jax.Array) -> Any:
    return whole(table_VD.astype(dtype), spec)[tokens_BS]


def _rows_fwd(spec: PartitionSpec, dtype: jnp.dtype, vocabulary: int, tokens_BS: jax.Array, table_VD: jax.Array) -> Any:
    return _rows(spec, dtype, vocabulary, tokens_BS, table_VD), (tokens_BS, table_VD[:0])


def _rows_bwd(spec: PartitionSpec, dtype: jnp.dtype, vocabulary: int, saved: tuple, g_BSD: jax.Array) -> tuple:
    tokens_BS, like = saved
    zeros_VD = jnp.zeros((vocabulary, g_BSD.shape[-1]), like.dtype)
    g_VD = zeros_VD.at[tokens_BS].add(g_BSD.astype(like.dtype))
    return np.zeros(tokens_BS.shape, jax.dtypes.float0), scattered(g_VD, spec)


_rows.defvjp(_rows_fwd, _rows_bwd)
