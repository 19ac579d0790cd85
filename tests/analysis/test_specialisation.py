"""Whom experts serve: against counting by hand, and on blocks of experts that are known."""

import numpy as np
import pytest

from emo_jax.analysis import specialisation
from emo_jax.analysis.reading import Reading, Text, label
from emo_jax.analysis.specialisation import blocks, chance_lift, coactivation, layers, saturation, vocabulary
from emo_jax.errors import UserError

DOCUMENTS = [Text("", name) for name in ("laws", "poems", "laws", "code", "poems")]


def reading(seed: int = 0, tokens: int = 240, experts=(5, 9), choices: int = 2, name: str = "m") -> Reading:
    rng = np.random.default_rng(seed)
    document_N = np.sort(np.r_[np.arange(5), rng.integers(0, 5, tokens - 5)]).astype(np.int32)
    token_N = (rng.geometric(0.2, tokens) * 11).astype(np.int32)
    probability_LNR = [rng.dirichlet(np.full(r, 0.4), tokens).astype(np.float16) for r in experts]
    chosen_LNC = [np.argsort(-p, axis=1, kind="stable")[:, :choices].astype(np.int16) for p in probability_LNR]
    return Reading(name, [f"<{token}>" for token in token_N], token_N, document_N, probability_LNR, chosen_LNC)


def test_a_layers_numbers_are_what_counting_gives():
    read = reading()
    labels = label(read, DOCUMENTS)
    assert labels.names == ["code", "laws", "poems"]
    for layer, numbers in enumerate(layers(read, labels)):
        p_NR, chosen_NC = read.probability_LNR[layer].astype(np.float64), read.chosen_LNC[layer]
        experts, means = p_NR.shape[1], []
        for d, name in enumerate(labels.names):
            mine = [n for n in range(len(p_NR)) if DOCUMENTS[read.document_N[n]].domain == name]
            mean_R = sum(p_NR[n] for n in mine) / len(mine)
            means.append(mean_R)
            use_R = [sum(e in chosen_NC[n] for n in mine) / len(mine) for e in range(experts)]
            np.testing.assert_allclose(numbers["probability"][d], mean_R, rtol=1e-6)
            np.testing.assert_allclose(numbers["use"][d], use_R)
            assert numbers["coverage"][d] == sum(p > 1 / experts for p in mean_R)
            assert numbers["entropy"][d] == pytest.approx(-sum(p * np.log2(p) for p in mean_R))
            effective = []
            for m in sorted({read.document_N[n] for n in mine}):
                own_R = p_NR[read.document_N == m].mean(axis=0)
                effective.append(np.exp(-sum(p * np.log(p) for p in own_R)))
            assert numbers["effective"][d] == pytest.approx(np.mean(effective), rel=1e-5)
        for a in range(3):
            for b in range(3):
                cosine = means[a] @ means[b] / np.linalg.norm(means[a]) / np.linalg.norm(means[b])
                assert numbers["similarity"][a][b] == pytest.approx(cosine)
        apart = [numbers["similarity"][a][b] for a in range(3) for b in range(3) if a != b]
        assert numbers["similarity_mean"] == pytest.approx(np.mean(apart))
        np.testing.assert_allclose(numbers["load"], [(chosen_NC == e).any(axis=1).mean() for e in range(experts)])
        assert sorted(numbers["order"]) == list(range(experts)) and len(numbers["block"]) == experts
    one = layers(read, label(read, [Text("", "")] * 5))
    assert one[0]["similarity_mean"] is None and one[0]["use"].shape == (1, 5)


def test_vocabulary_is_the_share_of_an_ids_occurrences():
    read = reading()
    chosen_NC = read.chosen_LNC[1]
    share, top = vocabulary(chosen_NC, read.token_N, read.pieces, 9)
    often = [x for x in np.unique(read.token_N) if (read.token_N == x).sum() >= specialisation.SEEN]
    assert 1 < len(often) < len(np.unique(read.token_N))
    by_hand = {x: [(chosen_NC[read.token_N == x] == e).any(axis=1).mean() for e in range(9)] for x in often}
    assert share == pytest.approx(np.mean([max(shares) for shares in by_hand.values()]))
    for e, ranked in enumerate(top):
        wanted = sorted((by_hand[x][e] for x in often if by_hand[x][e] > 0), reverse=True)[: len(ranked)]
        np.testing.assert_allclose([found for _, found, _ in ranked], wanted)
        for piece, found, seen in ranked:
            x = int(piece[1:-1])
            assert found == pytest.approx(by_hand[x][e]) and seen == (read.token_N == x).sum()
    assert vocabulary(chosen_NC[:5], read.token_N[:5], read.pieces[:5], 9) == (None, [[]] * 9)


def test_coactivation_is_counted_and_chance_is_below_one():
    read = reading(choices=3)
    lift_RR, together_RR = coactivation(read.chosen_LNC[1], 11)  # two of them never chosen
    has = np.array([[e in row for e in range(11)] for row in read.chosen_LNC[1]])
    for i in range(11):
        for j in range(11):
            both, one, other = (has[:, i] & has[:, j]).mean(), has[:, i].mean(), has[:, j].mean()
            assert lift_RR[i, j] == pytest.approx(1 if i == j or one * other == 0 else both / (one * other))
            assert together_RR[i, j] == pytest.approx(both / one if one else 0)
    rng = np.random.default_rng(0)
    random_NC = np.argsort(rng.random((20_000, 8)), axis=1)[:, :3]
    lift_RR, _ = coactivation(random_NC, 8)
    assert lift_RR[~np.eye(8, dtype=bool)].mean() == pytest.approx(chance_lift(8, 3), abs=0.01)


def test_experts_that_work_together_stand_together_in_a_block():
    rng = np.random.default_rng(1)
    group_R = rng.permutation(np.repeat(np.arange(4), 5))  # experts of four teams, shuffled
    team_N = rng.integers(0, 4, 3000)
    members = np.array([np.flatnonzero(group_R == team) for team in range(4)])
    own_NC = np.array([rng.choice(members[team], 3, replace=False) for team in team_N])
    stray_N = rng.random(3000) < 0.2
    own_NC[stray_N] = np.argsort(rng.random((stray_N.sum(), 20)), axis=1)[:, :3]
    order_R, block_R = blocks(coactivation(own_NC, 20)[0], 3)
    assert len(set(block_R)) == 4 and len(set(zip(group_R, block_R, strict=True))) == 4
    assert (np.diff(block_R[order_R]) >= 0).all() and sorted(order_R) == list(range(20))  # blocks follow the order
    assert [part.tolist() for part in blocks(np.ones((1, 1)), 1)] == [[0], [0]]


def test_saturation_is_the_share_of_choices_kept():
    early, late = reading(name="early"), reading(name="late")
    assert saturation(early, late) == [1.0, 1.0]
    chosen_NC = np.roll(late.chosen_LNC[1], 3, axis=0)
    late = late._replace(chosen_LNC=[late.chosen_LNC[0][:, ::-1], chosen_NC])
    kept = [len(set(a) & set(b)) / 2 for a, b in zip(early.chosen_LNC[1].tolist(), chosen_NC.tolist(), strict=True)]
    assert saturation(early, late) == [1.0, pytest.approx(np.mean(kept))]
    with pytest.raises(UserError, match="early and other do not read the same tokens with the same experts"):
        saturation(early, reading(seed=1, name="other"))
    with pytest.raises(UserError, match="checkpoints of one run"):
        saturation(early, reading(experts=(5, 8)))
