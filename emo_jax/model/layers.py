"""The small pieces that layers share: annotated weights, RMSNorm, the dense SwiGLU.

Letters: B rows, S sequence, D model, F hidden.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from emo_jax.model.config import ModelConfig
from emo_jax.parallel import product

# Annotations are only names here: `parallel.RULES` places them, and no mesh is needed to build a module.
nnx.use_eager_sharding(False)


def param_dtype(config: ModelConfig) -> jnp.dtype:
    """Of master weights: float32, or float64 where the whole computation is (verification)."""
    return jnp.promote_types(config.dtype, jnp.float32)


def weight(config: ModelConfig, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """Declares a parameter, its axes named for sharding; `init_parameters` gives it values where it lives."""
    return nnx.Param(jnp.zeros(shape, param_dtype(config)), out_sharding=axes)


def scale(config: ModelConfig, width: int = 0) -> nnx.Param:
    """Declares an RMSNorm's scale [D], or of another width."""
    return weight(config, (width or config.d_model,), ("norm",))


def rms_norm(x_BSD: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """Returns x / √(mean x² + ε) · scale, in float32 (or wider), as x's dtype."""
    wide = x_BSD.astype(jnp.promote_types(x_BSD.dtype, jnp.float32))
    normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (normal * scale_D.reshape(1, 1, -1)).astype(x_BSD.dtype)


class FeedForward(nnx.Module):
    """Dense SwiGLU: down(silu(gate x) ⊙ up x). Shared experts are one of these, side by side in `hidden`."""

    def __init__(self, config: ModelConfig, hidden: int):
        d = config.d_model
        self.gate = weight(config, (d, hidden), ("embed", "mlp"))
        self.up = weight(config, (d, hidden), ("embed", "mlp"))
        self.down = weight(config, (hidden, d), ("mlp", "embed"))

    def __call__(self, x_BSD: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """[B, S, D] to [B, S, D], in x's dtype."""
        gate, up = (product("bsd,df->bsf", x_BSD, w[...], ("embed", "mlp"), mesh) for w in (self.gate, self.up))
        return product("bsf,fd->bsd", jax.nn.silu(gate) * up, self.down[...], ("mlp", "embed"), mesh)
