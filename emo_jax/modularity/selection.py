"""From statistics to a subset: how many experts a layer keeps, and which."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from emo_jax.errors import require, require_choice
from emo_jax.model import ModelConfig
from emo_jax.modularity.calibration import Statistics, calibrate
from emo_jax.modularity.criteria import CRITERIA, score
from emo_jax.modularity.subset import Subset, fingerprint

METHODS = (*CRITERIA, "random")
BUDGETS = ("uniform", "variable", "mass")


def select(
    config: ModelConfig,
    params: Any,
    calibration: Sequence[Iterable[dict[str, np.ndarray]]],
    *,
    method: str = "router_mass",
    keep: int = 0,
    greedy: bool = True,
    budget: str = "uniform",
    mass: float = 0.0,
    seed: int = 0,
    data: str = "",
) -> Subset:
    """Chooses the experts to keep for a task, or for several at once.

    Args:
      config: of the model.
      params: its parameters.
      calibration: one list of batches a task (see `calibrate`); several tasks count alike, by the mean of their scores.
      method: a criterion, or `random`.
      keep: experts of a layer, the shared ones included, as the papers count; unused with budget `mass`.
      greedy: layer by layer on the already cut model (the paper); False: one pass over the whole model.
      budget: `uniform`: `keep` in each layer; `variable`: as many in all, shared out over the layers by score, at least
        C each; `mass`: the smallest set whose scores reach `mass` of a layer's total (ESFT, arXiv 2407.01906).
      mass: 0..1, for budget `mass`.
      seed: of `random`.
      data: fingerprint of the calibration set, kept in the subset.

    Raises:
      UserError: where an argument cannot work, or a calibration set is empty.
    """
    require_choice("method", method, METHODS)
    require_choice("budget", budget, BUDGETS)
    require(bool(config.routed_experts), "The model is dense: it has no experts to keep.")
    least, routed = config.fewest_experts, keep - config.shared_experts
    if budget == "mass":
        require(0 < mass <= 1, f"mass={mass} must lie in 0..1: the share of a layer's score to keep.")
    else:
        check_keep(config, keep)
    require(
        not greedy or budget != "variable",
        "budget='variable' compares layers, which a greedy walk does not know in advance; set greedy=False.",
    )
    always = [config.always_active(layer) for layer in range(len(config.routed_experts))]
    described = f"{method} keep={keep} budget={budget}" + (f" mass={mass}" if budget == "mass" else "")
    described += " greedy" if greedy and method != "random" else ""
    if method == "random":
        rng = np.random.default_rng(seed)
        scores = [rng.random(experts) for experts in config.routed_experts]
        experts = _share_out(scores, always, routed, budget, mass, least)
        return Subset(experts, fingerprint(config, params), f"{described} seed={seed}", data)

    sets = [list(batches) for batches in calibration]
    require(bool(sets), "There is no calibration set.")
    if not greedy:
        every = [[score(method, s) for s in calibrate(config, params, batches)] for batches in sets]
        mean = [np.mean(layer, axis=0) for layer in zip(*every, strict=True)]
        return Subset(
            _share_out(mean, always, routed, budget, mass, least), fingerprint(config, params), described, data
        )
    if len(sets) == 1:
        chosen: list[tuple[int, ...]] = []

        def choose(layer: int, statistics: Statistics) -> np.ndarray:
            chosen.extend(_share_out([score(method, statistics)], always[layer:], routed, budget, mass, least))
            return np.isin(np.arange(config.routed_experts[layer]), chosen[layer])

        calibrate(config, params, sets[0], choose)
        return Subset(tuple(chosen), fingerprint(config, params), described, data)
    require(False, "A greedy walk follows one calibration set; set greedy=False for several, or unite their subsets.")
    raise AssertionError


def check_keep(config: ModelConfig, keep: int) -> None:
    """Raises `UserError` unless a layer of the model can keep so many experts, shared ones included."""
    least, most = (count + config.shared_experts for count in (config.fewest_experts, min(config.routed_experts)))
    require(
        least <= keep <= most,
        f"keep={keep} must lie in {least}..{most}: it counts the {config.shared_experts} shared experts, and a "
        f"token uses {least} (model.{'split_top_k' if config.split_layers else 'top_k'}).",
    )


def _share_out(
    scores: Sequence[np.ndarray],
    always: Sequence[tuple[int, ...]],
    routed: int,
    budget: str,
    mass: float,
    least: int,
) -> tuple[tuple[int, ...], ...]:
    """The best experts of each layer, those that are always active before all others, ties to the lower index."""
    orders = [
        np.lexsort((-score_R, ~np.isin(np.arange(len(score_R)), first)))
        for score_R, first in zip(scores, always, strict=False)
    ]
    if budget == "uniform":
        counts = [routed] * len(scores)
    elif budget == "mass":
        counts = []
        for score_R, order in zip(scores, orders, strict=True):
            reached = np.cumsum(score_R[order]) / score_R.sum()
            counts.append(max(least, min(int((reached < mass - 1e-12).sum()) + 1, len(score_R))))
    else:
        total = routed * len(scores)
        ranked = [
            (-score_R[i], layer, place)
            for layer, (score_R, order) in enumerate(zip(scores, orders, strict=True))
            for place, i in enumerate(order)
        ]
        counts = [least] * len(scores)
        for _, layer, place in sorted(entry for entry in ranked if entry[2] >= least)[: total - least * len(scores)]:
            counts[layer] = max(counts[layer], place + 1)
    return tuple(tuple(sorted(int(i) for i in order[:count])) for order, count in zip(orders, counts, strict=True))
