"""Do clusters and experts know a document's domain, or only the words of it? Information, with what chance gives.

Letters: N tokens, M documents, C choices of a token, R routed experts, K clusters.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from emo_jax.analysis.reading import Labels

_PERMUTATIONS = 20
_SHUFFLES = 5


def agreement(label_N: np.ndarray, domain_N: np.ndarray) -> dict[str, float]:
    """How well a partition tells domains apart.

    Returns:
      `nmi`, normalised mutual information (by the mean of both entropies); `ari`, the adjusted Rand index; `purity`,
      the share of points whose cluster has their domain as its most frequent one.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score  # takes a second to import
    from sklearn.metrics.cluster import contingency_matrix

    return {
        "nmi": float(normalized_mutual_info_score(domain_N, label_N)),
        "ari": float(adjusted_rand_score(domain_N, label_N)),
        "purity": float(contingency_matrix(label_N, domain_N).max(axis=1).sum() / len(label_N)),
    }


def agreement_and_chance(label_N: np.ndarray, labels: Labels, seed: int) -> dict[str, Any]:
    """`agreement` of clusters with domains, and what it would be by chance.

    Returns:
      `nmi`, `ari`, `purity`; the same in `permuted`, where documents, whole, have each other's domains, and in
      `random`, where points have each other's clusters; of each (mean, largest) over several draws.
    """
    rng = np.random.default_rng(seed)
    by_chance: dict[str, list[dict[str, float]]] = {"permuted": [], "random": []}
    for _ in range(_PERMUTATIONS):
        permuted_N = rng.permutation(labels.domain_M)[labels.document_N]
        by_chance["permuted"].append(agreement(label_N, permuted_N))
        by_chance["random"].append(agreement(rng.permutation(label_N), labels.domain_N))
    result: dict[str, Any] = agreement(label_N, labels.domain_N)
    for kind, draws in by_chance.items():
        values = {name: [draw[name] for draw in draws] for name in draws[0]}
        result[kind] = {name: (float(np.mean(drawn)), max(drawn)) for name, drawn in values.items()}
    return result


def expert_information(
    chosen_NC: np.ndarray, token_N: np.ndarray, labels: Labels, experts: int, seed: int
) -> dict[str, Any]:
    """What the experts that a layer chooses tell about the domain and about the token, in bits.

    Each choice counts 1/C. Estimates are plug-in, and so too large: where counts are few, chance looks like
    information. So each comes with what it is, on average, where a shuffle has cut the dependence, and that is
    subtracted:

    - I(E; domain): documents, whole, have each other's domains. A shuffle over tokens would leave in what tokens of one
      document share (its topic, its style), which then would count as knowledge of its domain.
    - I(E; token): tokens have each other's ids.
    - I(E; domain | token) = Σ_x p(x) I(E; domain | x), what experts tell about the domain beyond what the token id x
      tells: for each id, the documents that it occurs in have each other's domains. So documents stay whole here too,
      and how many of an id's documents a domain has stays what it is: ids of one domain alone add nothing to either
      estimate, as do ids that are too rare to say anything.

    Chance is that of no dependence, and larger than the bias where there is some: shares err on the safe side, the more
    so the less text there is. Compare them on the same documents.

    Returns:
      `entropy`: H(E); `domain`, `token`, `domain_given_token`: each with `bits`, the plug-in estimate, `chance`, the
      shuffled one, and `share`, (bits − chance) / H(E).
    """
    rng, choices = np.random.default_rng(seed), chosen_NC.shape[1]
    expert_O = chosen_NC.astype(np.int64).ravel()  # O: observations, N·C of them
    token_N = np.unique(token_N, return_inverse=True)[1]
    domains, domain_N = len(labels.names), labels.domain_N

    def with_expert(code_N: np.ndarray) -> np.ndarray:
        return np.repeat(code_N, choices) * experts + expert_O

    def about(code_N: np.ndarray) -> float:
        return of_experts + _entropy(code_N) - _entropy(with_expert(code_N))

    def beyond_token(domain_N: np.ndarray) -> float:
        pair_N = token_N * domains + domain_N
        return with_token - _entropy(token_N) + _entropy(pair_N) - _entropy(with_expert(pair_N))

    def corrected(bits: float, shuffled: Iterator[float]) -> dict[str, float]:
        chance = float(np.mean([*shuffled]))
        return {"bits": bits, "chance": chance, "share": (bits - chance) / max(of_experts, 1e-12)}

    of_experts, with_token = _entropy(expert_O), _entropy(with_expert(token_N))
    draws = range(_SHUFFLES)
    others = (rng.permutation(labels.domain_M)[labels.document_N] for _ in draws)
    return {
        "entropy": of_experts,
        "domain": corrected(about(domain_N), map(about, others)),
        "token": corrected(about(token_N), (about(rng.permutation(token_N)) for _ in draws)),
        "domain_given_token": corrected(
            beyond_token(domain_N), (beyond_token(_exchanged(token_N, labels, rng)) for _ in draws)
        ),
    }


def _exchanged(token_N: np.ndarray, labels: Labels, rng: np.random.Generator) -> np.ndarray:
    """Each token's domain, where for each id the documents that it occurs in have exchanged theirs."""
    documents = len(labels.domain_M)
    pairs, pair_N = np.unique(token_N * documents + labels.document_N, return_inverse=True)  # sorted by token
    shuffled = np.lexsort((rng.random(len(pairs)), pairs // documents))
    return labels.domain_M[pairs % documents][shuffled][pair_N]


def entropy(counts: np.ndarray) -> float:
    """Of what so many observations fell on, in bits."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _entropy(code_N: np.ndarray) -> float:
    """Of the codes' frequencies, in bits."""
    return entropy(np.unique(code_N, return_counts=True)[1])
