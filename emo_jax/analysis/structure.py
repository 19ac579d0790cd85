"""How far the use of experts follows the domains of documents: what a run logs of itself at each evaluation.

`emo_jax.explore` says more, of a trained model. Letters: M documents, Z domains, R routed experts, L mixture layers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from emo_jax.analysis.information import entropy
from emo_jax.analysis.specialisation import likeness
from emo_jax.evaluation import Choices

SHUFFLES = 16
"""Permutations of the documents' domains that tell what chance gives."""
SHOWN = 24
"""Domains whose use of experts is logged: those with the most documents."""


def domain_structure(choices: Choices, domains: Sequence[str], seed: int = 0) -> dict[str, Any] | None:
    """Numbers for `metrics.jsonl`, or None for a dense model or documents of one domain.

    Args:
      choices: of the documents.
      domains: their names.
      seed: of the permutations.

    Returns:
      `information`, [L]: I(expert; domain) of a token's choice, less what it is on average where the domains are
      permuted among the documents, over H(expert); `chance`, [L], is that average over H(expert). Whole documents are
      permuted, since their tokens agree on experts whatever the domain.
      `similarity`, [L]: the mean cosine of two domains' use of experts.
      `use`, [L, Z, R]: how many of a domain's tokens choose an expert, over an even share, of the domains `names`.
    """
    domain_M, count_LMR = choices
    found_Z, place_M, size_Z = np.unique(domain_M, return_inverse=True, return_counts=True)
    if not count_LMR or len(found_Z) < 2:
        return None
    rng = np.random.default_rng(seed)
    one_ZZ = np.eye(len(found_Z))
    permuted = [one_ZZ[rng.permutation(place_M)].T for _ in range(SHUFFLES)]
    shown = np.sort(np.argsort(-size_Z, kind="stable")[:SHOWN])
    made: dict[str, Any] = {"names": [domains[found_Z[z]] for z in shown]}
    for count_MR in count_LMR:
        use_ZR = one_ZZ[place_M].T @ count_MR
        of_experts = max(entropy(use_ZR.sum(axis=0)), 1e-12)
        chance = float(np.mean([_information(other_ZM @ count_MR) for other_ZM in permuted])) / of_experts
        values = {
            "information": _information(use_ZR) / of_experts - chance,
            "chance": chance,
            "similarity": likeness(use_ZR)[1],
            "use": np.round((use_ZR / use_ZR.mean(axis=1, keepdims=True))[shown], 3).tolist(),
        }
        for name, value in values.items():
            made.setdefault(name, []).append(value)
    return made


def _information(count_ZR: np.ndarray) -> float:
    """I of the two places of an observation: H(Z) + H(R) − H(Z, R), in bits."""
    return entropy(count_ZR.sum(axis=0)) + entropy(count_ZR.sum(axis=1)) - entropy(count_ZR.ravel())
