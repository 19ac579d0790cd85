"""`routed_experts`: dispatch, grouped SwiGLU, combine.

Letters: T tokens, C choices a token, R routed experts, D width, F expert hidden, M slots, N blocks, P rows a block.
"""

import functools

import jax
import jax.numpy as jnp

from emo_jax.errors import require_choice
from emo_jax.kernels.experts import dispatch as ops
from emo_jax.kernels.experts import gpu_products, tpu_sizes
from emo_jax.kernels.experts.libraries import PRODUCTS, Product
from emo_jax.kernels.experts.pallas_gpu import routed_experts_gpu
from emo_jax.kernels.experts.pallas_tpu import routed_experts_tpu
from emo_jax.kernels.experts.reference import reference
from emo_jax.kernels.experts.streamed import streamed

IMPLEMENTATIONS = ("blocked", "ragged", "megablox", "tokamax", "pallas_tpu", "pallas_gpu", "streamed", "reference")

BLOCK = 64
"""Rows a block on CPU: the fastest of 32, 64 and 128 (BUILD_NOTES.md)."""
STREAMED_TOKENS = 64
"""Most tokens for which experts are streamed: on CPU faster than blocks up to twice as many (BUILD_NOTES.md)."""


def default_implementation(platform: str) -> str:
    """The fastest formulation for many tokens on a "cpu", "gpu" or "tpu"; measured reasons in BUILD_NOTES.md."""
    return {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(platform, "blocked")


def best_implementation(tokens: int) -> str:
    """The fastest on the default backend for T tokens."""
    if tokens <= STREAMED_TOKENS:  # being decoded: do not touch the weights of all experts
        return "streamed"
    return default_implementation(jax.default_backend())


def routed_experts(
    x_TD: jax.Array,
    indices_TC: jax.Array,
    weights_TC: jax.Array,
    gate_RDF: jax.Array,
    up_RDF: jax.Array,
    down_RFD: jax.Array,
    *,
    implementation: str | None = None,
    filled: int | None = None,
) -> jax.Array:
    """Σ_c weight · Expert(x) over each token's chosen experts; Expert = down(silu(gate x) ⊙ up x). No token is dropped.

    Args:
      x_TD: tokens, in the dtype of the computation.
      indices_TC: int32 chosen experts; R for a token that reaches no expert, whose result is 0.
      weights_TC: float32 (or wider) weight of each choice.
      gate_RDF, up_RDF, down_RFD: expert weights, in the dtype of `x_TD` (any dtype with `streamed`).
      implementation: `blocked` (groups padded to blocks, each with a copy of its expert's weights),
        `ragged` (`jax.lax.ragged_dot`: on CPU and GPU every expert on every row), `megablox`, `tokamax` (kernels of
        those libraries), `pallas_tpu` (our kernels for TPU; bfloat16 or float32, D a multiple of 256 or 128, F of 128),
        `pallas_gpu` (for GPU; D and F multiples of 64; both hand arrays that they do not take to `ragged`), `streamed`
        (one chosen expert after another: reads their weights alone, fit for a few tokens), `reference`; None: the best
        for the platform and so many tokens.
      filled: the most choices that have an expert, where the caller knows it: buffers are no larger. None: all may.

    Returns:
      [T, D] of `x_TD`'s dtype, differentiable in everything but the indices.

    Raises:
      UserError: on an unknown implementation.
    """
    implementation = implementation or best_implementation(len(x_TD))
    require_choice("implementation", implementation, IMPLEMENTATIONS)
    arguments = (x_TD, indices_TC, weights_TC, gate_RDF, up_RDF, down_RFD)
    if implementation in ("reference", "streamed"):
        return (reference if implementation == "reference" else streamed)(*arguments)
    if implementation == "pallas_tpu":
        experts, width, hidden = gate_RDF.shape
        most = indices_TC.size if filled is None else min(filled, indices_TC.size)
        if sizes := tpu_sizes.best_sizes(most, experts, indices_TC.shape[1], width, hidden, x_TD.dtype):
            return routed_experts_tpu(*arguments, sizes=sizes, filled=filled)
        implementation = "ragged"
    if implementation == "pallas_gpu":
        if cuts := gpu_products.best_sizes(gate_RDF.shape[1], gate_RDF.shape[2], x_TD.dtype):
            return routed_experts_gpu(*arguments, sizes=cuts, filled=filled)
        implementation = "ragged"
    y_MD, plan = _outputs(*arguments, implementation, filled)
    return ops.combine(y_MD, plan)


def expert_norms(
    x_TD: jax.Array,
    indices_TC: jax.Array,
    gate_RDF: jax.Array,
    up_RDF: jax.Array,
    down_RFD: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """‖Expert(x)‖₂ of each token's chosen experts, [T, C], float32 or wider; 0 for a token that reaches none.

    Arguments as in `routed_experts`; only `blocked` and `ragged` are offered.
    """
    implementation = implementation or ("blocked" if jax.default_backend() == "cpu" else "ragged")
    require_choice("implementation", implementation, IMPLEMENTATIONS[:2])
    ones_TC = jnp.ones(indices_TC.shape, jnp.promote_types(x_TD.dtype, jnp.float32))
    y_MD, plan = _outputs(x_TD, indices_TC, ones_TC, gate_RDF, up_RDF, down_RFD, implementation)
    norm_M = jnp.linalg.norm(y_MD.astype(jnp.promote_types(y_MD.dtype, jnp.float32)), axis=-1)
    return norm_M.at[plan.slot_TC].get(mode="fill", fill_value=0)


def _outputs(
    x_TD: jax.Array,
    indices_TC: jax.Array,
    weights_TC: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    implementation: str,
    filled: int | None = None,
) -> tuple[jax.Array, ops.Plan]:
    """Each slot's weighted expert output [M, D], and where the slots are."""
    plan = ops.plan(indices_TC, gate.shape[0], BLOCK if implementation == "blocked" else 1, filled)
    ffn = _blocked_ffn if implementation == "blocked" else functools.partial(_grouped_ffn, PRODUCTS[implementation])
    return ffn(ops.dispatch(x_TD, plan), ops.dispatch_weights(weights_TC, plan), plan, gate, up, down), plan


def _grouped_ffn(
    product: Product,
    x_MD: jax.Array,
    weight_M: jax.Array,
    plan: ops.Plan,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    gate_MF, up_MF = (product(x_MD, w, plan.counts_R) for w in (gate, up))
    return product(_gated(gate_MF, up_MF, weight_M), down, plan.counts_R)


def _blocked_ffn(
    x_MD: jax.Array, weight_M: jax.Array, plan: ops.Plan, gate: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
    width = x_MD.shape[1]
    x_NPD = x_MD.reshape(-1, BLOCK, width)
    first_slot_N = jnp.arange(x_NPD.shape[0], dtype=jnp.int32) * BLOCK
    expert_N = jnp.searchsorted(plan.starts_R, first_slot_N, side="right") - 1
    gate_NPF, up_NPF = (_block_matmul(x_NPD, w, expert_N) for w in (gate, up))
    hidden_NPF = _gated(gate_NPF, up_NPF, weight_M.reshape(-1, BLOCK))
    return _block_matmul(hidden_NPF, down, expert_N).reshape(-1, width)


# A choice's weight acts here, where rows are narrowest: so its gradient needs no expert's output, and none is kept.
@jax.custom_vjp
def _gated(gate_MF: jax.Array, up_MF: jax.Array, weight_M: jax.Array) -> jax.Array:
    """Weight · silu(gate) ⊙ up, in the weight's precision, as the others' dtype; any axes before F."""
    wide = weight_M.dtype
    return (jax.nn.silu(gate_MF.astype(wide)) * up_MF.astype(wide) * weight_M[..., None]).astype(gate_MF.dtype)


def _gated_fwd(*args: jax.Array) -> tuple[jax.Array, tuple]:
    return _gated(*args), args


def _gated_bwd(saved: tuple, g_MF: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    gate_MF, up_MF, weight_M = saved
    gate, up, g = (x.astype(weight_M.dtype) for x in (gate_MF, up_MF, g_MF))
    sigmoid = jax.nn.sigmoid(gate)
    silu, weighted = gate * sigmoid, g * weight_M[..., None]
    d_gate = weighted * up * (sigmoid + silu * (1 - sigmoid))
    return d_gate.astype(gate_MF.dtype), (weighted * silu).astype(up_MF.dtype), (g * silu * up).sum(-1)


_gated.defvjp(_gated_fwd, _gated_bwd)


# The backward pass sums blocks into experts over sorted indices; autodiff of the gather would not know them sorted.
@jax.custom_vjp
def _block_matmul(x_NPD: jax.Array, w_RDF: jax.Array, expert_N: jax.Array) -> jax.Array:
    return jnp.einsum("npd,ndf->npf", x_NPD, w_RDF[expert_N])


def _block_matmul_fwd(x_NPD, w_RDF, expert_N):
    return _block_matmul(x_NPD, w_RDF, expert_N), (x_NPD, w_RDF, expert_N)


def _block_matmul_bwd(saved, g_NPF):
    x_NPD, w_RDF, expert_N = saved
    dx_NPD = jnp.einsum("npf,ndf->npd", g_NPF, w_RDF[expert_N])
    dw_NDF = jnp.einsum("npd,npf->ndf", x_NPD, g_NPF)
    dw_RDF = jax.ops.segment_sum(dw_NDF, expert_N, w_RDF.shape[0], indices_are_sorted=True)
    return dx_NPD, dw_RDF.astype(w_RDF.dtype), None


_block_matmul.defvjp(_block_matmul_fwd, _block_matmul_bwd)
