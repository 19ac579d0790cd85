"""Agreement and information: against counting by hand, and on texts where the answer is known."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.analysis.information import _exchanged, agreement, agreement_and_chance, expert_information
from emo_jax.analysis.reading import Labels

EXPERTS = 6


def entropy(values) -> float:
    counts = Counter(values)
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def information(a, b) -> float:
    return entropy(a) + entropy(b) - entropy(zip(a, b, strict=True))


def given_third(a, b, condition) -> float:
    """Σ_x p(x) I(a; b | x)."""
    total = 0.0
    for x in set(condition):
        mine = [n for n, value in enumerate(condition) if value == x]
        total += len(mine) / len(condition) * information([a[n] for n in mine], [b[n] for n in mine])
    return total


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=4, max_size=40))
def test_agreement_is_what_counting_pairs_gives(pairs):
    labels, domains = map(list, zip(*pairs, strict=True))
    found = agreement(np.array(labels), np.array(domains))
    mean = (entropy(labels) + entropy(domains)) / 2
    wanted = information(labels, domains) / mean if mean else 1.0
    assert found["nmi"] == pytest.approx(wanted, abs=1e-9)
    by_label = {k: Counter(d for label, d in pairs if label == k) for k in set(labels)}
    assert found["purity"] == pytest.approx(sum(max(count.values()) for count in by_label.values()) / len(pairs))
    both = one = other = 0
    every = list(itertools.combinations(range(len(pairs)), 2))
    for a, b in every:
        both += labels[a] == labels[b] and domains[a] == domains[b]
        one += labels[a] == labels[b]
        other += domains[a] == domains[b]
    expected, most = one * other / len(every), (one + other) / 2
    if most != expected:
        assert found["ari"] == pytest.approx((both - expected) / (most - expected), abs=1e-9)


def corpus(documents: int = 60, length: int = 40, domains: int = 3, words: int = 30, seed: int = 0):
    """Documents of domains that share their words, and the labels; token ids are drawn alike everywhere."""
    rng = np.random.default_rng(seed)
    domain_M = np.arange(documents) % domains
    document_N = np.repeat(np.arange(documents), length)
    token_N = rng.integers(0, words, documents * length) * 7  # ids with gaps
    return rng, token_N, Labels([f"domain {d}" for d in range(domains)], domain_M, document_N)


def chosen(first_N, rng):
    """Two experts of a token: the given one, and another at random."""
    other_N = (first_N + rng.integers(1, EXPERTS, len(first_N))) % EXPERTS
    return np.stack([first_N, other_N], axis=1).astype(np.int16)


def test_estimates_are_what_counting_each_choice_gives():
    rng, token_N, labels = corpus(documents=12, length=9, words=8)
    token_N[labels.document_N == 3] = 999  # occurs in one domain alone
    chosen_NC = chosen((token_N + labels.domain_N) % EXPERTS, rng)
    found = expert_information(chosen_NC, token_N, labels, EXPERTS, 0)
    experts = chosen_NC.ravel().tolist()
    tokens, domains = (np.repeat(values, 2).tolist() for values in (token_N, labels.domain_N))
    assert found["entropy"] == pytest.approx(entropy(experts))
    assert found["domain"]["bits"] == pytest.approx(information(experts, domains))
    assert found["token"]["bits"] == pytest.approx(information(experts, tokens))
    assert found["domain_given_token"]["bits"] == pytest.approx(given_third(experts, domains, tokens))
    for name in ("domain", "token", "domain_given_token"):
        one = found[name]
        assert one["share"] == pytest.approx((one["bits"] - one["chance"]) / found["entropy"]) and one["chance"] > 0
    again = expert_information(chosen_NC, token_N, labels, EXPERTS, 0)
    assert found == again != expert_information(chosen_NC, token_N, labels, EXPERTS, 1)


def test_experts_that_follow_words_know_a_domain_only_by_its_words():
    rng, token_N, labels = corpus()
    follows_words = chosen(token_N % EXPERTS, rng)
    found = expert_information(follows_words, token_N, labels, EXPERTS, 0)
    assert abs(found["domain"]["share"]) < 0.005 and abs(found["domain_given_token"]["share"]) < 0.01
    assert found["token"]["share"] > 0.15
    # Each domain prefers a third of the words: the experts now tell the domain, but nothing beyond the word.
    prefers = rng.random(len(token_N)) < 0.7
    token_N = np.where(prefers, labels.domain_N + 3 * rng.integers(0, 10, len(token_N)), token_N // 7)
    found = expert_information(chosen(token_N % EXPERTS, rng), token_N, labels, EXPERTS, 0)
    assert found["domain"]["share"] > 0.03 and abs(found["domain_given_token"]["share"]) < 0.01


def test_experts_that_follow_domains_tell_of_them_whatever_the_word():
    _, token_N, labels = corpus()
    chosen_NC = (labels.domain_N + 3 * (token_N % 2))[:, None]  # one choice, three equal domains: log₂ 3 bits
    found = expert_information(chosen_NC, token_N, labels, EXPERTS, 0)
    assert found["domain"]["bits"] == pytest.approx(np.log2(3), abs=1e-3)
    assert found["domain_given_token"]["bits"] == pytest.approx(np.log2(3), abs=0.03)
    for name in ("domain", "domain_given_token"):
        assert 0.9 * np.log2(3) / found["entropy"] < found[name]["share"] <= np.log2(3) / found["entropy"]


def test_experts_that_follow_documents_are_no_knowledge_of_domains():
    rng, token_N, labels = corpus(documents=30)
    found = []
    for seed in range(12):
        taste_M = rng.integers(0, EXPERTS, 30)  # of a document, whatever its domain
        chosen_NC = taste_M[labels.document_N][:, None].astype(np.int16)
        found.append(expert_information(chosen_NC, token_N, labels, EXPERTS, seed))
    assert abs(np.mean([one["domain"]["share"] for one in found])) < 0.02
    assert np.mean([one["domain"]["bits"] / one["entropy"] for one in found]) > 0.05
    assert abs(np.mean([one["domain_given_token"]["share"] for one in found])) < 0.02
    assert np.mean([one["domain_given_token"]["bits"] / one["entropy"] for one in found]) > 0.1


def test_words_of_one_domain_alone_add_nothing_and_cost_nothing():
    """Were documents permuted once for all words, chance would count those words, and knowledge could fall below 0."""
    rng, token_N, labels = corpus(documents=24, words=5)
    chosen_NC = chosen(labels.domain_N + 3 * rng.integers(0, 2, len(token_N)), rng)
    own_N = rng.random(len(token_N)) < 0.8
    with_own_N = np.where(own_N, 10_000 + 50 * labels.domain_N + rng.integers(0, 50, len(token_N)), token_N)
    rest = Labels(labels.names, labels.domain_M, labels.document_N[~own_N])
    both = []
    for seed in range(8):
        found = expert_information(chosen_NC, with_own_N, labels, EXPERTS, seed)["domain_given_token"]
        shared = expert_information(chosen_NC[~own_N], token_N[~own_N], rest, EXPERTS, seed)["domain_given_token"]
        both.append([(one["bits"], one["chance"]) for one in (found, shared)])
    found, shared = np.mean(both, axis=0)
    np.testing.assert_allclose(found, (~own_N).mean() * shared, rtol=0.1)  # Σ p(x) I_x over the shared words alone
    np.testing.assert_allclose(found[0], (~own_N).mean() * shared[0])
    apart_N = np.arange(len(token_N))  # no id twice: nothing can be said
    nothing = expert_information(chosen_NC, apart_N, labels, EXPERTS, 0)["domain_given_token"]
    assert nothing == pytest.approx({"bits": 0, "chance": 0, "share": 0}, abs=1e-9)


def test_documents_of_an_id_exchange_domains_whole():
    rng, token_N, labels = corpus(documents=9, length=30, words=12)
    exchanged_N = _exchanged(np.unique(token_N, return_inverse=True)[1], labels, rng)
    changed = 0
    for x in set(token_N):
        before, after = {}, {}
        for n in np.flatnonzero(token_N == x):
            document = labels.document_N[n]
            before[document] = labels.domain_N[n]
            assert after.setdefault(document, exchanged_N[n]) == exchanged_N[n]
        assert sorted(before.values()) == sorted(after.values())
        changed += before != after
    assert changed > 8


def test_chance_is_small_for_real_clusters_and_all_there_is_for_random_ones():
    rng, _, labels = corpus(documents=90, length=20)
    real_N = np.where(rng.random(len(labels.document_N)) < 0.8, labels.domain_N, rng.integers(0, 3, 1800))
    found = agreement_and_chance(real_N, labels, 0)
    assert found["nmi"] > 0.3 > 0.05 > found["permuted"]["nmi"][1] >= found["permuted"]["nmi"][0]
    assert found["random"]["nmi"][1] < 0.01 and found["random"]["purity"][0] < 0.4 < found["purity"]
    by_document = agreement_and_chance(labels.document_N % 7, labels, 0)
    # What documents share is more than what points share: only the first is what a label could get by luck.
    assert by_document["permuted"]["nmi"][0] > 2 * by_document["random"]["nmi"][0]
    assert by_document == agreement_and_chance(labels.document_N % 7, labels, 0)
