"""Domain structure from counts of documents, against sums over single observations.

Letters: M documents, Z domains, R routed experts.
"""

import itertools
import math

import numpy as np
import pytest

from emo_jax.analysis import domain_structure
from emo_jax.evaluation import Choices

DOMAINS = ("code", "unread", "prose")


def information(pairs) -> float:
    """I(domain; expert) in nats, by its definition, of a list of observations."""
    pairs, total = list(pairs), 0.0
    for pair in set(pairs):
        joint = pairs.count(pair) / len(pairs)
        apart = math.prod(sum(other[i] == pair[i] for other in pairs) / len(pairs) for i in (0, 1))
        total += joint * math.log(joint / apart)
    return total


def entropy(count_R) -> float:
    share_R = count_R / count_R.sum()
    return -sum(p * math.log(p) for p in share_R if p)


def observations(count_MR, domain_M):
    for m, r in np.ndindex(count_MR.shape):
        yield from [(int(domain_M[m]), r)] * int(count_MR[m, r])


def test_information_is_what_remains_above_all_permutations():
    rng = np.random.default_rng(0)
    domain_M = np.array([0, 0, 2, 2], np.int32)
    count_MR = rng.integers(0, 6, (4, 3)).astype(np.float32)
    found = domain_structure(Choices(domain_M, [count_MR]), DOMAINS)
    choice = entropy(count_MR.sum(0))
    whole = information(observations(count_MR, domain_M)) / choice
    np.testing.assert_allclose(found["information"][0] + found["chance"][0], whole, atol=1e-12)
    every = [information(observations(count_MR, order)) / choice for order in itertools.permutations(domain_M)]
    assert min(every) <= found["chance"][0] <= max(every)
    assert found["names"] == ["code", "prose"]
    use_ZR = np.stack([count_MR[:2].sum(0), count_MR[2:].sum(0)])
    cosine = use_ZR[0] @ use_ZR[1] / np.prod(np.linalg.norm(use_ZR, axis=1))
    np.testing.assert_allclose(found["similarity"], [cosine])
    np.testing.assert_allclose(found["use"][0], use_ZR / use_ZR.mean(1, keepdims=True), atol=6e-4)


def test_documents_that_keep_to_few_experts_tell_nothing_without_domains():
    """Each document's tokens agree on one expert: much information about the document, none about its domain."""
    rng = np.random.default_rng(1)
    domain_M = np.repeat(np.array([0, 1, 2], np.int32), 40)
    count_MR = np.eye(16, dtype=np.float32)[rng.integers(0, 16, 120)] * 100
    found = domain_structure(Choices(domain_M, [count_MR]), DOMAINS)
    assert abs(found["information"][0]) < found["chance"][0] / 2
    own = np.eye(16, dtype=np.float32)[domain_M * 5 + rng.integers(0, 5, 120)] * 100
    found = domain_structure(Choices(domain_M, [own]), DOMAINS)
    assert found["information"][0] > 0.8 * math.log(3) / entropy(own.sum(0)) and found["similarity"][
        0
    ] == pytest.approx(0)


def test_one_domain_or_a_dense_model_has_no_structure():
    assert domain_structure(Choices(np.zeros(3, np.int32), [np.ones((3, 4), np.float32)]), DOMAINS) is None
    assert domain_structure(Choices(np.arange(3), []), DOMAINS) is None
