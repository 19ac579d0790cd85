"""What a model keeps of a domain when only some experts stay: retention, cross-domain matrix, random subsets.

Letters: Z domains.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from emo_jax.errors import require
from emo_jax.evaluation import HeldoutLoss, Loss, make_heldout_loss
from emo_jax.model import ModelConfig
from emo_jax.modularity.selection import select
from emo_jax.modularity.subset import Subset, kept_masks
from emo_jax.parallel import MeshConfig, make_mesh

Batches = list[dict[str, np.ndarray]]
WEIGHTINGS = ("renormalized", "original")


@dataclasses.dataclass(frozen=True)
class Retention:
    """Losses of one model; every loss without document pools.

    Attributes:
      full: of each domain, with all experts.
      kept: (domain, method, keep, weighting) → the domain's loss with the subset chosen for it.
      matrix: (domain the subset was chosen for, domain evaluated) → loss, at keep `matrix_keep`, renormalised.
      matrix_keep: experts kept there, shared included.
      subsets: (domain, method, keep) → the subset.
    """

    full: dict[str, Loss]
    kept: dict[tuple[str, str, int, str], Loss]
    matrix: dict[tuple[str, str], Loss]
    matrix_keep: int
    subsets: dict[tuple[str, str, int], Subset]


class SubsetLosses:
    """Test losses of a model under subsets of its experts; compiled once."""

    def __init__(self, config: ModelConfig, params: Any, test: dict[str, Batches]):
        """For the test batches of each domain, all of one shape (`data.domain_batches` or `data.example_batches`)."""
        require(bool(test), "There are no test documents.")
        self.config, self.params = config, params
        rows = next(iter(test.values()))[0]["tokens"].shape[0]
        documents = max(int(batch["document_ids"].max()) for batches in test.values() for batch in batches)
        one = {"document_domains": np.zeros((rows, max(documents, 1)), np.int32)}  # a domain is evaluated by itself
        self.test = {domain: [batch | one for batch in batches] for domain, batches in test.items()}
        mesh = make_mesh(MeshConfig(), rows, jax.devices()[:1])
        self._loss = make_heldout_loss(config, mesh, ["all"])

    def full(self) -> dict[str, Loss]:
        """Of each domain, with all experts."""
        return {domain: self._of(batches, None).all for domain, batches in self.test.items()}

    def under(self, subset: Subset, domain: str, *, renormalized: bool = True, ablate: bool = False) -> Loss:
        """Of one domain, with the subset's experts, or with all but them."""
        masks = kept_masks(self.config, subset, renormalized=renormalized, ablate=ablate)
        return self._of(self.test[domain], masks).all

    def _of(self, batches: Batches, kept: Any) -> HeldoutLoss:
        return self._loss(self.params, batches, kept)


def measure_retention(
    config: ModelConfig,
    params: Any,
    calibration: dict[str, Batches],
    losses: SubsetLosses,
    *,
    keeps: Sequence[int],
    matrix_keep: int,
    methods: Sequence[str] = ("router_mass",),
    random_seeds: int = 0,
    log: Callable[[str], None] = lambda text: None,
) -> Retention:
    """Chooses a subset for each domain, method and size on calibration batches and evaluates it on test batches.

    Args:
      config: of the model.
      params: its parameters.
      calibration: batches of each domain.
      losses: of the test documents of each domain, of the same names or some of them.
      keeps: sizes, shared experts included.
      matrix_keep: the size of the cross-domain matrix, of the first method; one of `keeps`.
      methods: criteria of `select`; layer by layer on the cut model.
      random_seeds: so many random subsets at `matrix_keep` too, as methods `random 0`, `random 1`, …
      log: receives a line a domain.

    Raises:
      UserError: where a test domain has no calibration batches, or a size cannot work.
    """
    missing = sorted(set(losses.test) - set(calibration))
    require(not missing, f"There are no calibration documents of {', '.join(missing)}.")
    require(matrix_keep in keeps, f"matrix_keep={matrix_keep} is not one of keep={list(keeps)}.")
    full = losses.full()
    kept: dict[tuple[str, str, int, str], Loss] = {}
    matrix: dict[tuple[str, str], Loss] = {}
    subsets: dict[tuple[str, str, int], Subset] = {}
    for domain in full:
        chosen = {
            (method, keep): select(config, params, [calibration[domain]], method=method, keep=keep)
            for method in methods
            for keep in keeps
        }
        chosen |= {
            (f"random {seed}", matrix_keep): select(config, params, [], method="random", keep=matrix_keep, seed=seed)
            for seed in range(random_seeds)
        }
        for (method, keep), subset in chosen.items():
            subsets[domain, method, keep] = subset
            for weighting in WEIGHTINGS:
                loss = losses.under(subset, domain, renormalized=weighting == "renormalized")
                kept[domain, method, keep, weighting] = loss
        for other in full:
            matrix[domain, other] = losses.under(chosen[methods[0], matrix_keep], other)
        first = kept[domain, methods[0], matrix_keep, "renormalized"]
        log(f"{domain}: {full[domain].loss:.3f} with all experts, {first.loss:.3f} with {matrix_keep} chosen for it")
    return Retention(full, kept, matrix, matrix_keep, subsets)


def specificity(retention: Retention) -> tuple[float, float]:
    """Mean loss of a domain under other domains' subsets minus under its own, in nats, and the same of accuracy."""
    domains = list(retention.full)
    own = [retention.matrix[d, d] for d in domains]
    others = [retention.matrix[d, e] for d in domains for e in domains if d != e]
    return (
        float(np.mean([loss.loss for loss in others]) - np.mean([loss.loss for loss in own])),
        float(np.mean([loss.accuracy for loss in own]) - np.mean([loss.accuracy for loss in others])),
    )
