"""The small pieces that layers share: annotated weights, norms, the dense feed-forward.

Letters: B rows, S sequence, D model, F hidden.
"""

import functools
from collections.abc import Callable

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


def vector(config: ModelConfig, width: int = 0) -> nnx.Param:
    """Declares a vector [D], or of another width: a norm's scale, which starts as ones, or a bias, as zeros."""
    return weight(config, (width or config.d_model,), ("norm",))


def rms_norm(x_BSD: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """Returns x / √(mean x² + ε) · scale, in float32 (or wider), as x's dtype."""
    wide = x_BSD.astype(jnp.promote_types(x_BSD.dtype, jnp.float32))
    normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (normal * scale_D.reshape(1, 1, -1)).astype(x_BSD.dtype)


def layer_norm(x_BSD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
    """Returns (x − mean x) / √(var x + ε) · scale + bias, in float32 (or wider), as x's dtype."""
    wide = x_BSD.astype(jnp.promote_types(x_BSD.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return (normal * scale_D.reshape(1, 1, -1) + bias_D.reshape(1, 1, -1)).astype(x_BSD.dtype)


def add_norm(module: nnx.Module, config: ModelConfig, name: str) -> None:
    """Gives a module the parameters of a norm over D: `name`, and `name`_bias for a LayerNorm."""
    setattr(module, name, vector(config))
    if config.norm == "layer":
        setattr(module, f"{name}_bias", vector(config))


def apply_norm(module: nnx.Module, name: str, x_BSD: jax.Array, epsilon: float) -> jax.Array:
    """The norm that `add_norm` gave the module, of x."""
    scale_D = getattr(module, name)[...]
    if hasattr(module, f"{name}_bias"):
        return layer_norm(x_BSD, scale_D, getattr(module, f"{name}_bias")[...], epsilon)
    return rms_norm(x_BSD, scale_D, epsilon)


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """Returns x [B, S, ...] plus a bias of the axes behind, in x's dtype; x itself where there is none."""
    return x if bias is None else x + bias[...].astype(x.dtype)[None, None]


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class FeedForward(nnx.Module):
    """Dense layer: down(silu(gate x) ⊙ up x), or down(act(up x)); each product with a bias where the model has them.

    Shared experts are one of these, side by side in `hidden`.
    """

    def __init__(self, config: ModelConfig, hidden: int):
        d = config.d_model
        self.activation = config.feed_forward
        if config.feed_forward == "swiglu":
            self.gate = weight(config, (d, hidden), ("embed", "mlp"))
        self.up = weight(config, (d, hidden), ("embed", "mlp"))
        self.down = weight(config, (hidden, d), ("mlp", "embed"))
        if config.biases:
            if config.feed_forward == "swiglu":
                self.gate_bias = vector(config, hidden)
            self.up_bias, self.down_bias = vector(config, hidden), vector(config)

    def hidden(self, x_BSD: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """What the neurons give, [B, S, F], in x's dtype."""
        gated = hasattr(self, "gate")
        activated_BSF = self.activated(x_BSD, mesh)
        return activated_BSF * self._product(x_BSD, "up", mesh) if gated else activated_BSF

    def activated(self, x_BSD: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """What the activation function makes of the neurons' keys, [B, S, F]: of a gated layer those of its gate."""
        return ACTIVATIONS[self.activation](self._product(x_BSD, "gate" if hasattr(self, "gate") else "up", mesh))

    def __call__(self, x_BSD: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """[B, S, D] to [B, S, D], in x's dtype."""
        return self.output(self.hidden(x_BSD, mesh), mesh)

    def output(self, hidden_BSF: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """The second product, [B, S, D], of what `hidden` returns."""
        y_BSD = product("bsf,fd->bsd", hidden_BSF, self.down[...], ("mlp", "embed"), mesh)
        return add_bias(y_BSD, getattr(self, "down_bias", None))

    def _product(self, x_BSD: jax.Array, name: str, mesh: Mesh | None) -> jax.Array:
        y_BSF = product("bsd,df->bsf", x_BSD, getattr(self, name)[...], ("embed", "mlp"), mesh)
        return add_bias(y_BSF, getattr(self, f"{name}_bias", None))
