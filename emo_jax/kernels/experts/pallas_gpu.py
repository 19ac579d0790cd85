"""`routed_experts` by our own GPU kernels: no sort, no scatter, and each row moved once in each direction.

As `pallas_tpu`, but on a GPU rows are contiguous, so that they are plain matrices between kernels.
Tokens push their rows to slots that lie in tiles of one expert each, products run over tiles, tokens pull results back.

Letters: T tokens, C choices a token, R routed experts, D width, F expert hidden, M slots, N tiles.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax.kernels.experts.gpu_products import Sizes, best_sizes, gated, gated_backward, outer, product
from emo_jax.kernels.experts.gpu_rows import pull, push
from emo_jax.kernels.experts.slots import Slots, Tiles, assign


def routed_experts_gpu(
    x_TD: jax.Array,
    indices_TC: jax.Array,
    weights_TC: jax.Array,
    gate_RDF: jax.Array,
    up_RDF: jax.Array,
    down_RFD: jax.Array,
    *,
    filled: int | None = None,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`routed_experts`; same arguments and result.

    Float32 products are as exact as `jax.default_matmul_precision` asks: TensorFloat-32 where it is not set.

    Args:
      x_TD, indices_TC, weights_TC, gate_RDF, up_RDF, down_RFD, filled: as there; a token's experts differ.
      sizes: how products are cut; None: as `best_sizes` says.
      interpret: of `pallas_call`.

    Raises:
      ValueError: without sizes, where `best_sizes` has none.
    """
    experts, width, hidden = gate_RDF.shape
    sizes = sizes or best_sizes(width, hidden, x_TD.dtype)
    if sizes is None:
        raise ValueError(f"no sizes for D {width}, F {hidden} and {x_TD.dtype}")
    slots = assign(indices_TC, experts, sizes.rows, filled)
    return _experts(x_TD, weights_TC.astype(jnp.float32), gate_RDF, up_RDF, down_RFD, slots, sizes, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _experts(*arguments: Any) -> jax.Array:
    return _forward(*arguments, saved=False)[0]


def _forward(
    x_TD: jax.Array,
    weights_TC: jax.Array,
    gate_RDF: jax.Array,
    up_RDF: jax.Array,
    down_RFD: jax.Array,
    slots: Slots,
    sizes: Sizes,
    interpret: bool,
    *,
    saved: bool = True,
) -> tuple[jax.Array, tuple]:
    options = {"sizes": sizes, "interpret": interpret}
    number = len(slots.tiles.expert_N) * sizes.rows
    x_MD, weight_M = push(x_TD, weights_TC, slots.slot_CT, slots=number, interpret=interpret)
    hidden_MF, *products = gated(x_MD, weight_M, gate_RDF, up_RDF, slots.tiles, saved=saved, **options)
    y_MD = product((hidden_MF,), (down_RFD,), slots.tiles, transposed=False, **options)
    y_TD, _ = pull(y_MD, None, slots.slot_CT, tokens=len(x_TD), interpret=interpret)
    return y_TD, (x_MD, weight_M, *products, gate_RDF, up_RDF, down_RFD, slots)


def _backward(sizes: Sizes, interpret: bool, saved: tuple, g_TD: jax.Array) -> tuple:
    x_MD, weight_M, gate_MF, up_MF, gate_RDF, up_RDF, down_RFD, slots = saved
    options = {"sizes": sizes, "interpret": interpret}
    g_MD, _ = push(g_TD, None, slots.slot_CT, slots=len(x_MD), interpret=interpret)
    d_gate_MF, d_up_MF, hidden_MF, d_weight_NM = gated_backward(
        g_MD, down_RFD, gate_MF, up_MF, weight_M, slots.tiles, **options
    )
    spans_2R = _spans(slots.tiles, len(gate_RDF), sizes.rows)
    (d_down_RFD,) = outer(hidden_MF, (g_MD,), spans_2R, **options)
    d_gate_RDF, d_up_RDF = outer(x_MD, (d_gate_MF, d_up_MF), spans_2R, **options)
    d_MD = product((d_gate_MF, d_up_MF), (gate_RDF, up_RDF), slots.tiles, transposed=True, **options)
    dx_TD, d_weights_TC = pull(d_MD, d_weight_NM, slots.slot_CT, tokens=len(g_TD), interpret=interpret)
    nothing = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), slots)
    return dx_TD, d_weights_TC, d_gate_RDF, d_up_RDF, d_down_RFD, nothing


_experts.defvjp(_forward, _backward)


def _spans(tiles: Tiles, experts: int, rows: int) -> jax.Array:
    """The first slot of each expert, and how many of them are filled: int32 [2, R]."""
    expert_1R = jnp.arange(experts, dtype=jnp.int32)[None]
    expert_N1, rows_N1 = tiles.expert_N[:, None], tiles.rows_N[:, None]
    first_R = (expert_N1 < expert_1R).sum(0, dtype=jnp.int32) * rows
    return jnp.stack([first_R, jnp.where(expert_N1 == expert_1R, rows_N1, 0).sum(0, dtype=jnp.int32)])
