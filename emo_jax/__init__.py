"""Pretraining, selection and use of modular mixture-of-experts language models in JAX.

`emo_jax.load(path)` reads a `Model`; call it on tokens for logits.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emo_jax.api import Model, load

__all__ = ["Model", "__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):  # on first use, so that `import emo_jax.errors` does not import JAX
        from emo_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
