"""LoRA (arXiv 2106.09685): weights change by a product of two thin factors, and only these are trained.

Here as an Optax transformation around another: parameters are the merged weights W' = W₀ + (α/r)·A·B at every step, so
whatever reads them sees an ordinary model, and the factors live in the optimizer's state. Nothing is lost by it, since
the gradients of A and B follow from that of W'.

Letters: I axes of a weight that a product sums over, O its other axes, R rank.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from emo_jax.config import OptimizerConfig
from emo_jax.training.frozen import is_factored, overlay, select

_STREAM = 2**32 - 1
"""What the seed's key is folded with: no place of a parameter, as those that initial weights are drawn with."""


class Factors(NamedTuple):
    """A change of a weight [I..., O...], up to its scale: a·b. Arrays, or whatever stands for them.

    Attributes:
      a_IR: the paper's A, transposed, [I..., R].
      b_RO: its B, transposed, [R, O...].
    """

    a_IR: Any
    b_RO: Any


class LoraState(NamedTuple):
    """Of the transformation.

    Attributes:
      factors: nested dict, one `Factors` for each parameter that has them.
      inner: state of the transformation that updates them and what is trained as a whole.
    """

    factors: dict[str, Any]
    inner: Any


def low_rank(config: OptimizerConfig, inner: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """Updates the factors of LoRA's targets by `inner`, and their weights by what the product changes.

    `inner` sees what is trained with a `Factors` in place of each target: so a global norm is of all of it, and decay
    is of the factors. A step is the paper's, with B = 0 at first, up to the rounding of W' after it.

    Args:
      config: its `lora_rank`, `lora_alpha` and `lora_targets` are read.
      inner: for example AdamW.
      seed: of the first factors.
    """
    scale = config.lora_alpha / config.lora_rank

    def targets(tree: Any) -> Any:
        return select(tree, lambda path: is_factored(config, path))

    def init(part: Any) -> LoraState:
        factors = first_factors(targets(part), config.lora_rank, seed)
        return LoraState(factors, inner.init(overlay(part, factors)))

    def update(gradients: Any, state: LoraState, part: Any = None) -> tuple[Any, LoraState]:
        old = state.factors
        slopes = jax.tree.map(lambda g_IO, pair: _gradients(g_IO, pair, scale), targets(gradients), old)
        updates, inner_state = inner.update(overlay(gradients, slopes), state.inner, overlay(part, old))
        new = optax.apply_updates(old, targets(updates))
        change = jax.tree.map(
            lambda before, after: _change(before, after, scale),
            old,
            new,
            is_leaf=lambda node: isinstance(node, Factors),
        )
        return overlay(updates, change), LoraState(new, inner_state)

    return optax.GradientTransformation(init, update)


def first_factors(weights: Any, rank: int, seed: int) -> Any:
    """B = 0, and A uniform in ±I^(−1/2), as the paper's code has it: the same for a seed on every mesh.

    Args:
      weights: nested dict of those that have factors, named as in a layer.
      rank: R.
      seed: of one draw that all A are parts of; XLA takes a second to compile each on CPUs.
    """
    leaves, tree = jax.tree.flatten_with_path(weights)
    shapes = []
    for path, leaf in leaves:
        summed = 2 if path[-1].key == "out" else 1  # heads and what is in them
        shapes.append((leaf.shape[:summed], leaf.shape[summed:], leaf.dtype))
    sizes = [rank * math.prod(rows) for rows, _, _ in shapes]
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _STREAM)
    uniform = jax.random.uniform(key, (sum(sizes),), jnp.result_type(*(dtype for *_, dtype in shapes)), -1, 1)
    pairs, start = [], 0
    for (rows, columns, dtype), size in zip(shapes, sizes, strict=True):
        a_IR = uniform[start : start + size].reshape(*rows, rank) / math.sqrt(math.prod(rows))
        pairs.append(Factors(a_IR.astype(dtype), jnp.zeros((rank, *columns), dtype)))
        start += size
    return jax.tree.unflatten(tree, pairs)


def _gradients(g_IO: jax.Array, pair: Factors, scale: float) -> Factors:
    """Of A and B, by that of W₀ + scale·A·B."""
    a_RI, b_OR = jnp.moveaxis(pair.a_IR, -1, 0), jnp.moveaxis(pair.b_RO, 0, -1)
    return Factors(scale * _product(g_IO, b_OR, b_OR.ndim - 1), scale * _product(a_RI, g_IO, a_RI.ndim - 1))


def _change(before: Factors, after: Factors, scale: float) -> jax.Array:
    """Returns scale·(A⁺·B⁺ − A·B) as scale·(ΔA·B⁺ + A·ΔB): a difference of near-equal products would be rounded."""
    moved_a_IR, moved_b_RO = after.a_IR - before.a_IR, after.b_RO - before.b_RO
    return scale * (_product(moved_a_IR, after.b_RO, 1) + _product(before.a_IR, moved_b_RO, 1))


def _product(left: jax.Array, right: jax.Array, axes: int) -> jax.Array:
    """Over the last axes of one and the first of the other; bfloat16 or TF32 by default on TPU and GPU."""
    return jnp.tensordot(left, right, axes, precision="highest")
