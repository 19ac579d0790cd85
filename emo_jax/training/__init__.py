"""How does a run proceed? The jitted step, its optimizer and losses, and the loop that logs, evaluates and saves."""

from emo_jax.training.loop import Result, train

__all__ = ["Result", "train"]
