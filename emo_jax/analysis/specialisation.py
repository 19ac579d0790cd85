"""Whom does each expert serve? Use by domain and by token, and which experts work together, of one mixture layer.

Letters: N tokens, M documents, D domains, R routed experts, C choices of a token, X token ids.
"""

from typing import Any

import numpy as np

from emo_jax.analysis.reading import Labels, Reading, document_means
from emo_jax.errors import require

SEEN = 10
"""Token ids that occur less often say nothing about an expert."""
_TOP_TOKENS = 8


def layers(reading: Reading, labels: Labels) -> list[dict[str, Any]]:
    """The numbers of each mixture layer, JSON-able but for arrays.

    Returns:
      probability [D, R]: mean over a domain's tokens.
      use [D, R]: share of a domain's tokens that choose the expert, OLMoE's domain specialisation N_{E,D}/N_D
        (arXiv 2409.02060).
      load [R]: the same over all tokens.
      coverage [D]: experts whose mean probability exceeds 1/R.
      entropy [D]: of the mean probabilities, in bits.
      similarity [D, D]: cosine of the mean probabilities; similarity_mean: off the diagonal, None for one domain.
      effective [D]: exp(H(a document's mean probabilities)), the experts it uses, mean over documents.
      vocabulary, top_tokens: see `vocabulary`.
      lift, together [R, R]: see `coactivation`.
      order, block [R]: see `blocks`.
    """
    from scipy.special import entr  # here, because it takes a third of a second to import

    result = []
    for probability_NR, chosen_NC, means_MR in zip(
        reading.probability_LNR, reading.chosen_LNC, document_means(reading), strict=True
    ):
        experts, domains = probability_NR.shape[1], range(len(labels.names))
        groups = [labels.domain_N == domain for domain in domains]
        mean_DR = np.array([probability_NR[group_N].mean(axis=0, dtype=np.float64) for group_N in groups])
        use_DR = np.array([_shares(chosen_NC[group_N], experts) for group_N in groups])
        effective_M = np.exp(entr(means_MR).sum(axis=1))
        similarity_DD, similarity = likeness(mean_DR)
        lift_RR, together_RR = coactivation(chosen_NC, experts)
        order_R, block_R = blocks(lift_RR, chosen_NC.shape[1])
        share, top_tokens = vocabulary(chosen_NC, reading.token_N, reading.pieces, experts)
        result.append(
            {
                "probability": mean_DR,
                "use": use_DR,
                "load": _shares(chosen_NC, experts),
                "coverage": (mean_DR > 1 / experts).sum(axis=1),
                "entropy": entr(mean_DR).sum(axis=1) / np.log(2),
                "similarity": similarity_DD,
                "similarity_mean": similarity,
                "effective": np.array([effective_M[labels.domain_M == domain].mean() for domain in domains]),
                "vocabulary": share,
                "top_tokens": top_tokens,
                "lift": lift_RR,
                "together": together_RR,
                "order": order_R,
                "block": block_R,
            }
        )
    return result


def vocabulary(
    chosen_NC: np.ndarray, token_N: np.ndarray, pieces: list[str], experts: int
) -> tuple[float | None, list[list[tuple[str, float, int]]]]:
    """OLMoE's vocabulary specialisation N_{x,E}/N_x: the share of a token id's occurrences that choose an expert.

    Returns:
      The largest share of any expert, mean over the token ids x that occur `SEEN` times or more (None where none does),
      and of each expert the ids with the largest shares: (text, share, occurrences).
    """
    ids_X, first_X, code_N, count_X = np.unique(token_N, return_index=True, return_inverse=True, return_counts=True)
    often_X = np.flatnonzero(count_X >= SEEN)
    if not len(often_X):
        return None, [[] for _ in range(experts)]
    row_X = np.full(len(ids_X), -1)
    row_X[often_X] = np.arange(len(often_X))
    row_N = row_X[code_N]
    pair_O = (row_N[:, None] * experts + chosen_NC)[row_N >= 0].ravel()
    share_XR = np.bincount(pair_O, minlength=len(often_X) * experts).reshape(-1, experts) / count_X[often_X, None]
    top_tokens = []
    for share_X in share_XR.T:
        best = np.argsort(-share_X, kind="stable")[:_TOP_TOKENS]
        top_tokens.append(
            [(pieces[first_X[often_X[x]]], float(share_X[x]), int(count_X[often_X[x]])) for x in best if share_X[x] > 0]
        )
    return float(share_XR.max(axis=1).mean()), top_tokens


def coactivation(chosen_NC: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """How often tokens choose two experts together.

    Returns:
      lift [R, R]: P(i and j) / (P(i) P(j)); 1 on the diagonal and where an expert is never chosen. Of experts chosen at
      random it is `chance_lift`, below 1, because a token chooses each but once.
      together [R, R]: OLMoE's N_ij / N_i, 0 where N_i is.
    """
    chosen_NR = np.zeros((len(chosen_NC), experts), np.float32)  # whose sums are exact up to 2²⁴ tokens
    np.put_along_axis(chosen_NR, chosen_NC.astype(np.int64), 1, axis=1)
    count_RR = (chosen_NR.T @ chosen_NR).astype(np.float64)
    count_R = count_RR.diagonal()
    expected_RR = count_R[:, None] * count_R[None, :] / len(chosen_NC)
    lift_RR = np.divide(count_RR, expected_RR, out=np.ones_like(count_RR), where=expected_RR > 0)
    np.fill_diagonal(lift_RR, 1)
    return lift_RR, count_RR / np.maximum(count_R, 1)[:, None]


def chance_lift(experts: int, choices: int) -> float:
    """Of two experts where each token chooses C of R at random: (C − 1) R / (C (R − 1))."""
    return (choices - 1) * experts / (choices * (experts - 1))


def blocks(lift_RR: np.ndarray, choices: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts sorted so that those that work together stand together.

    Average linkage on the distance 1 / (1 + lift); the tree is cut where experts are together as often as by chance.

    Returns:
      order [R]: experts, by the tree's optimal leaf order; block [R]: of each expert, numbered along that order.
    """
    from scipy.cluster import hierarchy  # here, because it takes half a second to import
    from scipy.spatial.distance import squareform

    experts = len(lift_RR)
    if experts == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    distance_RR = 1 / (1 + (lift_RR + lift_RR.T) / 2)
    np.fill_diagonal(distance_RR, 0)
    tree = hierarchy.linkage(squareform(distance_RR, checks=False), "average", optimal_ordering=True)
    order_R = hierarchy.leaves_list(tree).astype(np.int64)
    group_R = hierarchy.fcluster(tree, 1 / (1 + chance_lift(experts, choices)), "distance")
    _, first, code_R = np.unique(group_R[order_R], return_index=True, return_inverse=True)
    block_R = np.empty(experts, np.int64)
    block_R[order_R] = np.argsort(np.argsort(first))[code_R]
    return order_R, block_R


def saturation(early: Reading, late: Reading) -> list[float]:
    """OLMoE's router saturation of each layer: share of a token's choices that it makes at both checkpoints of a run.

    Raises:
      UserError: where the readings are not of the same tokens and experts.
    """
    same = np.array_equal(early.token_N, late.token_N) and np.array_equal(early.document_N, late.document_N)
    shapes = [[part.shape for part in reading.probability_LNR] for reading in (early, late)]
    require(
        same and shapes[0] == shapes[1] and early.chosen_LNC[0].shape == late.chosen_LNC[0].shape,
        f"{early.name} and {late.name} do not read the same tokens with the same experts: saturation compares two "
        "checkpoints of one run.",
    )
    return [
        float((a_NC[:, :, None] == b_NC[:, None, :]).any(axis=2).mean())
        for a_NC, b_NC in zip(early.chosen_LNC, late.chosen_LNC, strict=True)
    ]


def _shares(chosen_NC: np.ndarray, experts: int) -> np.ndarray:
    """Share of the tokens that choose each expert [R]."""
    return np.bincount(chosen_NC.ravel(), minlength=experts) / len(chosen_NC)


def likeness(use_DR: np.ndarray) -> tuple[np.ndarray, float | None]:
    """Cosines of domains' use of experts [D, D], and their mean off the diagonal; None for one domain."""
    unit_DR = use_DR / np.linalg.norm(use_DR, axis=1, keepdims=True)
    cosine_DD = unit_DR @ unit_DR.T
    apart_DD = ~np.eye(len(cosine_DD), dtype=bool)
    return cosine_DD, float(cosine_DD[apart_DD].mean()) if apart_DD.any() else None
