"""How good is it? Held-out loss by domain, without document pools: likelihoods, comparable between models."""

from emo_jax.evaluation.heldout import Choices, HeldoutLoss, Loss, make_heldout_loss

__all__ = ["Choices", "HeldoutLoss", "Loss", "make_heldout_loss"]
