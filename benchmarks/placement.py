"""Do experts that are used together save bytes when they lie on the same expert-parallel rank?

`python benchmarks/placement.py --models EMO_RUN STD_RUN --corpus=DIR [--ranks 4 8 16] [--out=DIR]` routes the documents
of DIR/heldout.jsonl.gz, which no run trained on, without pools and, where a run has them, with one for every document.
Half of the documents gives each layer's placement, the other half every figure but "fit":

  fit, ranks  different ranks that a token's choices fall on: where the placement was found, and held out
  sent        rows a token and layer, one way, were it sent once to each other rank that holds one of its experts
  a2a, ring   its saving on today's transports: a row a choice, a row a rank, both whatever the placement
  index       its saving on the same exchange with experts in their order
  load        choices on the fullest rank over the mean, in groups of X × 4 shuffled rows: median, 99th percentile, and
              the share of (layer, group) pairs beyond the buffer
  stay        share of choices that stay, if a group's rows went where they suit best, four to a rank, by their routing
              in all layers (an oracle's, an upper bound), or by their domain alone; 1 / X by chance
  sent*       "sent", with the oracle's ranks

Models larger than emo_tiny, with the recipe that modularity.py found, minutes each on two CPU cores:

    W="--config.data.source=jsonl --config.data.path=DIR/train.jsonl.gz --config.train.eval_every=0
       --config.model.num_experts=64 --config.model.top_k=8 --config.model.d_expert=16"
    python -m emo_jax.train --config=configs/stdmoe_tiny.py --workdir=runs/std64 $W [--config.balance.weight=0.01]
    python -m emo_jax.train --config=configs/emo_tiny.py --workdir=runs/emo64 $W --config.pool.min=16 \\
      --config.pool.max=16 --config.pool.whole_fraction=0.75 --config.pool.whole_step=800  # with 128 experts: 32, 32
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from modularity import test_documents
from scipy.optimize import linear_sum_assignment

from emo_jax.config import Config

# Letters: B rows, S sequence, T tokens, L mixture layers, R routed experts (in the search: with spare ones, so that
# every rank has as many), C choices, X ranks, G groups of rows.

ROWS, BUFFER = 4, 1.5  # rows of a rank, and what a round takes of its mean load
SEARCHED = 16_384  # tokens of a layer that the search looks at
FIGURES = ("fit", "ranks", "sent", "a2a", "ring", "index", "load", "load99", "second", "stay", "stay_domain", "sent*")
HEAD = f"{'':13}   fit  ranks   sent    a2a   ring  index    load                stay  domain  sent*"
LINE = "{:13}" + " {:6.3f}" * 3 + " {:6.1%}" * 3 + "  {:5.2f} {:5.2f} {:6.1%}" + "  {:5.1%}  {:5.1%}  {:6.3f}"

Half = tuple[np.ndarray, np.ndarray]
"""Chosen experts [B, L, S, C] of some rows, and the domain of each row."""


def descend(chosen_TR, spread_RR, place_R, ranks: int, weight: float) -> tuple[float, np.ndarray]:
    """Swaps two experts, best first, while that lowers a token's mean ranks + `weight` × the ranks' squared loads.

    What a swap changes depends on its two ranks alone, so swaps between other ranks add up exactly.
    """
    place_R, value, expected = place_R.copy(), np.inf, np.inf
    while True:
        on_RX = np.eye(ranks, dtype=np.float32)[place_R]
        count_TX, met_RX = chosen_TR @ on_RX, spread_RR @ on_RX
        before, value = value, float((count_TX > 0).sum(1).mean() + weight * (on_RX * met_RX).sum())
        assert before == np.inf or (value < before and abs(value - expected) < 1e-3), "swaps add up"
        alone_TR = chosen_TR * (count_TX == 1)[:, place_R]
        cost_RX = chosen_TR.T @ (count_TX == 0).astype(np.float32) - alone_TR.sum(0)[:, None]
        half_RR = (cost_RX[:, place_R] + alone_TR.T @ chosen_TR) / len(chosen_TR)
        own_R = (on_RX * met_RX).sum(1)
        half_RR += 2 * weight * (met_RX[:, place_R] - own_R + np.diag(spread_RR) - spread_RR)
        change_RR = half_RR + half_RR.T
        change_RR[place_R[:, None] == place_R] = np.inf
        expected = value
        while (best := change_RR.min()) < -1e-5:
            a, b = np.unravel_index(change_RR.argmin(), change_RR.shape)
            used_R = np.isin(place_R, place_R[[a, b]])
            place_R[[a, b]] = place_R[[b, a]]
            change_RR[used_R] = change_RR[:, used_R] = np.inf
            expected += best
        if expected == value:
            return value, place_R


def agglomerate(chosen_TR: np.ndarray, ranks: int) -> np.ndarray:
    """Fills rank after rank: the busiest expert left, then always the one that is used most with those there."""
    together_RR = chosen_TR.T @ chosen_TR
    load_R, place_R = np.diag(together_RR).copy(), np.full(len(together_RR), -1)
    for rank in range(ranks):
        for slot in range(len(place_R) // ranks):
            score_R = together_RR[place_R == rank].sum(0) if slot else load_R
            place_R[np.where(place_R < 0, score_R, -np.inf).argmax()] = rank
    return place_R


def find_placement(indices_TC: np.ndarray, spread_RR: np.ndarray, ranks: int, weight: float) -> np.ndarray:
    """The best of three starts: the experts' order, an agglomeration and a random one."""
    experts, size = len(spread_RR), -(-len(spread_RR) // ranks)
    chosen_TR = np.zeros((len(indices_TC), ranks * size), np.float32)
    np.put_along_axis(chosen_TR, indices_TC.astype(int), 1, 1)
    spread_RR, order_R = np.pad(spread_RR, (0, ranks * size - experts)), np.repeat(np.arange(ranks), size)
    starts = [order_R, agglomerate(chosen_TR, ranks), np.random.default_rng(0).permutation(order_R)]
    found = [descend(chosen_TR, spread_RR, start, ranks, weight) for start in starts]
    place_R = min(found, key=lambda end: end[0])[1]
    assert (np.bincount(place_R, minlength=ranks) == size).all(), "every rank has its share"
    return place_R[:experts]


def check_planted(experts: int = 127, choices: int = 7, ranks: int = 8) -> None:
    """Blocks of experts that tokens use together, but for a tenth of the choices, are found."""
    random = np.random.default_rng(0)
    block_R = random.permutation(np.arange(experts) % ranks)
    members = [np.flatnonzero(block_R == block) for block in range(ranks)]
    indices_TC = np.stack([random.permutation(members[t % ranks])[:choices] for t in range(SEARCHED)])
    noise_TC, noisy_TC = random.integers(experts, size=indices_TC.shape), random.random(indices_TC.shape) < 0.1
    place_R = find_placement(np.where(noisy_TC, noise_TC, indices_TC), np.zeros((experts, experts)), ranks, 0.0)
    assert ((place_R[:, None] == place_R) == (block_R[:, None] == block_R)).all(), "planted blocks are found"
    print(f"{ranks} planted blocks of {experts} experts found")


def trace_halves(run: Config, folder: Path, corpus: Path, pooled: bool) -> list[Half]:
    """The whole rows of either half of the held-out documents, shuffled."""
    import jax

    import emo_jax
    from emo_jax.data import Split, domain_batches, encode, load_tokenizer
    from emo_jax.model import bind, draw_pools

    model, random = emo_jax.load(folder), np.random.default_rng(0)
    # As for most of the steps: those that let documents go without a pool come last.
    pool = dataclasses.replace(run.pool, whole_fraction=0.0, whole_step=0) if pooled else None
    experts, documents = run.model.routed_experts, run.data.max_documents
    sizes = {"rows": 16, "layers": len(experts), "documents": documents, "experts": max(experts)}

    @jax.jit
    def choose(params, batch, step):
        draws = draw_pools(pool, run.train.seed, step, **sizes) if pooled else None
        given = (batch[name] for name in ("tokens", "document_ids", "positions"))
        _, routings = bind(run.model, params)(*given, pool=pool, draws=draws, documents=documents)
        return jax.numpy.stack([routing.indices_BSC for routing in routings], axis=1).astype("uint8")

    made = test_documents(corpus)[0]
    names = sorted({one["domain"] for one in made})
    kinds = random.permutation(len(made)) % 2 * len(names) + [names.index(one["domain"]) for one in made]
    order = np.argsort(kinds, kind="stable")
    texts = [made[i]["text"].encode()[: run.data.max_document_bytes].decode(errors="ignore") for i in order]
    tokenizer = load_tokenizer(model.tokenizer, model.end_of_text, run.model.vocab_size)
    tokens = [[*ids, model.end_of_text_id] for ids in encode(tokenizer, texts)]
    split = Split(np.concatenate(tokens), np.cumsum([0, *map(len, tokens)]), kinds[order])
    rows, step, labels = ([], []), run.train.steps, [(half, name) for half in range(2) for name in names]
    for (half, name), batches in domain_batches(split, labels, run.data, sizes["rows"]).items():
        for batch in batches:
            whole_B = (batch["document_ids"] > 0).all(1)
            found_BLSC, step = np.asarray(choose(model.params, batch, np.int32(step))), step + 1
            rows[half].extend((row_LSC, name) for row_LSC in found_BLSC[whole_B])
    mixed = [[part[i] for i in random.permutation(len(part))] for part in rows]
    return [(np.stack([row for row, _ in part]), np.array([name for _, name in part])) for part in mixed]


def counts(indices_BLSC: np.ndarray, experts: int) -> np.ndarray:
    """Choices of each expert, or rank, in each row: [B, L, R]."""
    rows, layers = indices_BLSC.shape[:2]
    bins = indices_BLSC.reshape(rows, layers, -1) + np.arange(rows * layers).reshape(rows, layers, 1) * experts
    return np.bincount(bins.ravel(), minlength=rows * layers * experts).reshape(rows, layers, -1).astype(np.float32)


def aligned(place_LR: np.ndarray, counts_BLR: np.ndarray, ranks: int) -> np.ndarray:
    """The same placement with each layer's ranks named so that a row's choices meet on one rank across layers."""
    place_LR, sum_BX = place_LR.copy(), 0.0
    for layer, place_R in enumerate(place_LR):
        load_BX = (counts_BLR[:, layer] - counts_BLR[:, layer].mean(0)) @ np.eye(ranks)[place_R]
        new_X = linear_sum_assignment(load_BX.T @ sum_BX, maximize=True)[1] if layer else np.arange(ranks)
        place_LR[layer] = new_X[place_R]
        sum_BX += load_BX[:, np.argsort(new_X)]
    return place_LR


def suited(wish_BX: np.ndarray, ranks: int) -> np.ndarray:
    """A rank for each row of whole groups of X × 4, four to a rank, for the largest sum of wishes."""
    groups = wish_BX[: len(wish_BX) // (ranks * ROWS) * ranks * ROWS].reshape(-1, ranks * ROWS, ranks)
    return np.concatenate([linear_sum_assignment(g.repeat(ROWS, 1), maximize=True)[1] // ROWS for g in groups])


def measure(halves: list[Half], place_LR: np.ndarray, ranks: int) -> dict[str, float]:
    """The table's figures and each domain's of one placement: all but "fit" from the second half."""
    layer_L11 = np.arange(len(place_LR))[:, None, None]
    (fit_BLSC, fit_domain_B), (rank_BLSC, domain_B) = ((place_LR[layer_L11, half[0]], half[1]) for half in halves)
    fit_BLS, found_BLS = (1 + (np.diff(np.sort(r, -1)) != 0).sum(-1) for r in (fit_BLSC, rank_BLSC))
    load_BLX, fit_BX = counts(rank_BLSC, ranks), counts(fit_BLSC, ranks).sum(1)
    typical_BX = np.stack([fit_BX[fit_domain_B == name].mean(0) for name in domain_B])
    wish_BX, labelled_B = load_BLX.sum(1), suited(typical_BX, ranks)
    own_B, rows = suited(wish_BX, ranks), len(labelled_B)
    group_GLX = load_BLX[:rows].reshape(-1, ranks * ROWS, *load_BLX.shape[1:]).sum(1)
    over_GL = group_GLX.max(-1) / group_GLX.mean(-1)
    figures = {"fit": fit_BLS.mean(), "ranks": found_BLS.mean(), "sent": found_BLS.mean() * (ranks - 1) / ranks}
    figures |= {"load": np.median(over_GL), "load99": np.quantile(over_GL, 0.99), "second": (over_GL > BUFFER).mean()}
    figures["stay"] = wish_BX[np.arange(rows), own_B].sum() / wish_BX[:rows].sum()
    figures["stay_domain"] = wish_BX[np.arange(rows), labelled_B].sum() / wish_BX[:rows].sum()
    figures["sent*"] = (found_BLS[:rows] - (rank_BLSC[:rows] == own_B[:, None, None, None]).any(-1)).mean()
    for name in np.unique(domain_B):
        mine_LX = load_BLX[domain_B == name].sum(0)
        figures[f"ranks, {name}"] = found_BLS[domain_B == name].mean()
        figures[f"fullest, {name}"] = (mine_LX.max(-1) / mine_LX.sum(-1)).mean()
    return {name: float(value) for name, value in figures.items()}


def placements(half: Half, experts: int, ranks: int, weights: list[float]) -> dict[str, list[np.ndarray]]:
    """Placements [L, R] by name, from one half of the documents."""
    random, counts_BLR, layers = np.random.default_rng(0), counts(half[0], experts), range(half[0].shape[1])
    order_R = np.arange(experts) // -(-experts // ranks)
    made = {"random": [np.stack([random.permutation(order_R) for _ in layers]) for _ in range(5)]}
    for weight in (0.0, *weights):
        place = []
        for layer in layers:
            some_TC = random.permutation(half[0][:, layer].reshape(-1, half[0].shape[-1]))[:SEARCHED]
            share_BR = counts_BLR[:, layer] / counts_BLR[0, layer].sum()
            # Of a group of rows: of its ranks' loads over their mean the variance, but for a constant.
            spread_RR = ranks * (np.outer(share_BR.mean(0), share_BR.mean(0)) + np.cov(share_BR.T) / (ranks * ROWS))
            place.append(find_placement(some_TC, spread_RR.astype(np.float32), ranks, weight))
        made[f"balance {weight:g}" if weight else "co-activation"] = [np.stack(place)]
    named = {name: [aligned(place_LR, counts_BLR, ranks) for place_LR in given] for name, given in made.items()}
    return {"index order": [np.stack([order_R for _ in layers])]} | named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="run directories")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of train.jsonl.gz and heldout.jsonl.gz")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--balance", type=float, nargs="*", default=[4.0, 16.0, 64.0], help="weights of uneven loads")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    check_planted()
    records, in_order = [], 0.0
    for folder in args.models:
        run = Config.from_json((folder / "config.json").read_text())
        for pooled in (False, True)[: 1 + (run.pool.kind != "none")]:
            halves = trace_halves(run, folder, args.corpus, pooled)
            for ranks in args.ranks:
                a2a, ring = run.model.num_choices * (ranks - 1) / ranks, ranks - 1
                title = f"{folder.name}, {'pools' if pooled else 'no pools'}, {ranks} ranks"
                print(f"\n{title}: {a2a:.2f} rows a token by all-to-all, {ring} by ring\n{HEAD}")
                for name, places in placements(halves[0], max(run.model.routed_experts), ranks, args.balance).items():
                    made = [measure(halves, place_LR, ranks) for place_LR in places]
                    f = {key: float(np.mean([one[key] for one in made])) for key in made[0]}
                    in_order = f["sent"] if name == "index order" else in_order
                    f |= {n: 1 - f["sent"] / rows for n, rows in (("a2a", a2a), ("ring", ring), ("index", in_order))}
                    print(LINE.format(name, *(f[key] for key in FIGURES)), flush=True)
                    records.append({"run": folder.name, "pooled": pooled, "X": ranks, "placement": name} | f)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "placement.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
