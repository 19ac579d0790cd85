"""`routed_experts`: dispatch, grouped SwiGLU, combine.

Letters: T tokens, C choices a token, R routed experts, D width, F expert hidden, M slots, N blocks, P rows a block.
"""

import jax
import jax.numpy as jnp

from emo_jax.errors import require_choice
from emo_jax.kernels.experts import dispatch as ops
from emo_jax.kernels.experts.reference import reference

IMPLEMENTATIONS = ("blocked", "ragged", "gathered", "reference")

BLOCK = 64
"""Rows a block on CPU: the fastest of 32, 64 and 128 (BUILD_NOTES.md)."""


def default_implementation(platform: str) -> str:
    """The fastest formulation for many tokens on a "cpu", "gpu" or "tpu"; measured reasons in BUILD_NOTES.md."""
    return "blocked" if platform == "cpu" else "ragged"


def best_implementation(choices: int, experts: int) -> str:
    """The fastest on the default backend for T·C choices among R experts."""
    if choices <= experts:  # a few tokens being decoded: do not touch the weights of all experts
        return "gathered"
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
) -> jax.Array:
    """Σ_c weight · Expert(x) over each token's chosen experts; Expert = down(silu(gate x) ⊙ up x). No token is dropped.

    Args:
      x_TD: tokens, in the dtype of the computation.
      indices_TC: int32 chosen experts; R for a token that reaches no expert, whose result is 0.
      weights_TC: float32 (or wider) weight of each choice.
      gate_RDF, up_RDF, down_RFD: expert weights, in the dtype of `x_TD` (any dtype with `gathered`).
      implementation: `blocked` (groups padded to blocks, each with a copy of its expert's weights),
        `ragged` (`jax.lax.ragged_dot`), `gathered` (a copy of its expert's weights for every choice: reads those of the
        chosen experts alone), `reference`; None: the best for the platform and the number of tokens.

    Returns:
      [T, D] of `x_TD`'s dtype, differentiable in everything but the indices.

    Raises:
      UserError: on an unknown implementation.
    """
    implementation = implementation or best_implementation(indices_TC.size, len(gate_RDF))
    require_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation in ("reference", "gathered"):
        compute = reference if implementation == "reference" else _gathered
        return compute(x_TD, indices_TC, weights_TC, gate_RDF, up_RDF, down_RFD)
    y_MD, plan = _outputs(x_TD, indices_TC, gate_RDF, up_RDF, down_RFD, implementation)
    return ops.combine(y_MD, weights_TC, plan)


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
    implementation = implementation or default_implementation(jax.default_backend())
    require_choice("implementation", implementation, IMPLEMENTATIONS[:2])
    y_MD, plan = _outputs(x_TD, indices_TC, gate_RDF, up_RDF, down_RFD, implementation)
    norm_M = jnp.linalg.norm(y_MD.astype(jnp.promote_types(y_MD.dtype, jnp.float32)), axis=-1)
    return norm_M.at[plan.slot_TC].get(mode="fill", fill_value=0)


def _outputs(
    x_TD: jax.Array, indices_TC: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, implementation: str
) -> tuple[jax.Array, ops.Plan]:
    """Each slot's expert output [M, D], and where the slots are."""
    plan = ops.plan(indices_TC, gate.shape[0], BLOCK if implementation == "blocked" else 1)
    ffn = _blocked_ffn if implementation == "blocked" else _ragged_ffn
    return ffn(ops.dispatch(x_TD, plan), plan, gate, up, down), plan


def _gathered(
    x_TD: jax.Array,
    indices_TC: jax.Array,
    weights_TC: jax.Array,
    gate_RDF: jax.Array,
    up_RDF: jax.Array,
    down_RFD: jax.Array,
) -> jax.Array:
    experts = len(gate_RDF)
    weights_TC = jnp.where(indices_TC < experts, weights_TC, 0)
    index_TC = jnp.minimum(indices_TC, experts - 1)
    gate, up, down = (w[index_TC].astype(x_TD.dtype) for w in (gate_RDF, up_RDF, down_RFD))  # [T, C, D, F] and so on
    hidden_TCF = jax.nn.silu(jnp.einsum("td,tcdf->tcf", x_TD, gate)) * jnp.einsum("td,tcdf->tcf", x_TD, up)
    y_TCD = jnp.einsum("tcf,tcfd->tcd", hidden_TCF, down).astype(weights_TC.dtype)
    return (weights_TC[:, :, None] * y_TCD).sum(1).astype(x_TD.dtype)


def _ragged_ffn(x_MD: jax.Array, plan: ops.Plan, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    hidden_MF = jax.nn.silu(jax.lax.ragged_dot(x_MD, gate, plan.counts_R))
    hidden_MF *= jax.lax.ragged_dot(x_MD, up, plan.counts_R)
    return jax.lax.ragged_dot(hidden_MF, down, plan.counts_R)


def _blocked_ffn(x_MD: jax.Array, plan: ops.Plan, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    width = x_MD.shape[1]
    x_NPD = x_MD.reshape(-1, BLOCK, width)
    first_slot_N = jnp.arange(x_NPD.shape[0], dtype=jnp.int32) * BLOCK
    expert_N = jnp.searchsorted(plan.starts_R, first_slot_N, side="right") - 1
    hidden_NPF = jax.nn.silu(_block_matmul(x_NPD, gate, expert_N)) * _block_matmul(x_NPD, up, expert_N)
    return _block_matmul(hidden_NPF, down, expert_N).reshape(-1, width)


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
