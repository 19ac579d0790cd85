"""`routed_experts` by our own TPU kernels: no sort, no scatter, and each row moved once in each direction.

Tokens push their rows to slots that lie in tiles of one expert each, products run over tiles, tokens pull results back.
What a choice weighs travels with its row, and acts where rows are narrowest, as in the other formulations.

Letters: T tokens, C choices a token, R routed experts, D width, F expert hidden, M slots, N tiles, Q rows a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax.kernels.experts.slots import Slots, assign
from emo_jax.kernels.experts.tpu_products import gated, gated_backward, outer, to_rows
from emo_jax.kernels.experts.tpu_rows import IDS_FROM, pull, push
from emo_jax.kernels.experts.tpu_sizes import Sizes


def routed_experts_tpu(
    x_TD: jax.Array,
    indices_TC: jax.Array,
    weights_TC: jax.Array,
    gate_RDF: jax.Array,
    up_RDF: jax.Array,
    down_RFD: jax.Array,
    *,
    sizes: Sizes,
    filled: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`routed_experts`, where `best_sizes` has sizes; a token's experts differ. `interpret`: of `pallas_call`."""
    slots = assign(indices_TC, len(gate_RDF), sizes.rows, filled)
    spare = slots.slot_CT.shape[1] - len(x_TD)
    tokens = [jnp.pad(a, ((0, spare), (0, 0))) if spare else a for a in (x_TD, weights_TC, indices_TC)]
    y_TD = _experts(*tokens, gate_RDF, up_RDF, down_RFD, slots, sizes, interpret)
    return y_TD[: len(x_TD)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _experts(*arguments: Any) -> jax.Array:
    return _forward(*arguments, saved=False)[0]


def _forward(
    x_TD: jax.Array,
    weights_TC: jax.Array,
    indices_TC: jax.Array,
    gate_RDF: jax.Array,
    up_RDF: jax.Array,
    down_RFD: jax.Array,
    slots: Slots,
    sizes: Sizes,
    interpret: Any,
    *,
    saved: bool = True,
) -> tuple[jax.Array, tuple]:
    number = len(slots.tiles.expert_N) * sizes.rows
    choices = weights_TC.shape[1]
    ids_TC = jax.lax.bitcast_convert_type(indices_TC, jnp.float32)
    numbers = (weights_TC.astype(jnp.float32), ids_TC)
    extra_TL = jnp.concatenate([jnp.pad(a, ((0, 0), (0, IDS_FROM - choices))) for a in numbers], axis=1)
    rows_MW = push(x_TD, slots.slot_CT, extra_TL, slots=number, vmem=sizes.vmem, interpret=interpret)
    options = {"sizes": sizes, "interpret": interpret}
    hidden_MF, *products = gated(rows_MW, gate_RDF, up_RDF, slots.tiles, saved=saved, **options)
    out_MW, *_ = to_rows((hidden_MF,), (down_RFD,), None, slots.tiles, transposed=False, **options)
    y_TD, _ = pull(out_MW, None, slots.slot_CT, dtype=x_TD.dtype, vmem=sizes.vmem, interpret=interpret)
    return y_TD, (rows_MW, *products, gate_RDF, up_RDF, down_RFD, slots, weights_TC[:0])


def _backward(sizes: Sizes, interpret: Any, saved: tuple, g_TD: jax.Array) -> tuple:
    rows_MW, gate_MF, up_MF, weight_PN1Q, gate_RDF, up_RDF, down_RFD, slots, weights_0C = saved
    options = {"sizes": sizes, "interpret": interpret}
    one_way = {"vmem": sizes.vmem, "interpret": interpret}
    counts = {"experts": len(gate_RDF), "width": g_TD.shape[1], **options}
    g_MW = push(g_TD, slots.slot_CT, None, slots=len(rows_MW), **one_way)
    d_gate, d_up, hidden, d_weight = gated_backward(
        g_MW, down_RFD, gate_MF, up_MF, weight_PN1Q[0], slots.tiles, **options
    )
    (d_down_RFD,) = outer(g_MW, (hidden,), slots.tiles, rows_first=False, **counts)
    d_gate_RDF, d_up_RDF = outer(rows_MW, (d_gate, d_up), slots.tiles, rows_first=True, **counts)
    d_MW, d_weight_ML = to_rows((d_gate, d_up), (gate_RDF, up_RDF), d_weight, slots.tiles, transposed=True, **options)
    dx_TD, d_weights_TL = pull(d_MW, d_weight_ML, slots.slot_CT, dtype=g_TD.dtype, **one_way)
    choices = weights_0C.shape[1]
    d_weights_TC = d_weights_TL[:, :choices].astype(weights_0C.dtype)
    whole = (np.zeros((len(g_TD), choices), jax.dtypes.float0), d_gate_RDF, d_up_RDF, d_down_RFD)
    return dx_TD, d_weights_TC, *whole, jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), slots)


_experts.defvjp(_forward, _backward)
