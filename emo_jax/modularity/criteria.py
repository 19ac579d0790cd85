"""How much a layer's experts matter to some text: each criterion a score [R] from its `Statistics`; higher is kept."""

from collections.abc import Callable

import numpy as np

from emo_jax.errors import require_choice
from emo_jax.modularity.calibration import Statistics


def router_mass(s: Statistics) -> np.ndarray:
    """Mean router probability (EMO, arXiv 2605.06663, section 5)."""
    return s.probability_R / s.tokens


def frequency(s: Statistics) -> np.ndarray:
    """Share of tokens that choose the expert."""
    return s.count_R / s.tokens


def gate(s: Statistics) -> np.ndarray:
    """Mean weight of the expert's output (ESFT-Gate, arXiv 2407.01906, equation 5)."""
    return s.gate_R / s.tokens


def easy_ep(s: Statistics) -> np.ndarray:
    """Σ weight · ‖output‖ · change of the residual stream (arXiv 2504.06792, as published)."""
    return s.easy_ep_R


def easy_ep_normed(s: Statistics) -> np.ndarray:
    """`easy_ep` as the public EMO code has it: the change of the layer's normalised input, shared experts included."""
    return s.easy_ep_normed_R


def reap(s: Statistics) -> np.ndarray:
    """Mean of weight · ‖output‖ over the tokens that choose the expert (arXiv 2510.13999, equation 9)."""
    return s.gated_norm_R / np.maximum(s.count_R, 1)


CRITERIA: dict[str, Callable[[Statistics], np.ndarray]] = {
    "router_mass": router_mass,
    "frequency": frequency,
    "gate": gate,
    "easy_ep": easy_ep,
    "easy_ep_normed": easy_ep_normed,
    "reap": reap,
}


def score(name: str, statistics: Statistics) -> np.ndarray:
    """The score of each expert, scaled to sum to 1 (so that layers and calibration sets can be averaged).

    Raises:
      UserError: on an unknown criterion.
    """
    require_choice("criterion", name, tuple(CRITERIA))
    values_R = np.asarray(CRITERIA[name](statistics), np.float64)
    total = values_R.sum()
    return values_R / total if total > 0 else np.full_like(values_R, 1 / len(values_R))
