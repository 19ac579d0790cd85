"""Is it modular? EMO against its baselines: `python benchmarks/modularity.py --corpus=DIR [--arms=emo --seeds=1]`.

DIR holds train.jsonl.gz and heldout.jsonl.gz, documents with a domain that only this script looks at. Every arm trains
on the same batches for the same steps, once a seed. A domain's experts are chosen (router_mass, layer by layer) on
documents of train.jsonl.gz that no arm trained on, and tested on heldout.jsonl.gz without near-duplicates of either.
Finished runs and measurements are kept in --out, so the command can be stopped and started again.

Written before the first run: it is a success where, over the seeds,
  1. at a quarter of the experts EMO loses at most a quarter of what the standard mixture loses, in nats and in
     next-token accuracy, with ranges that do not overlap, on all domains and on English prose alone, with the kept
     experts' weights renormalised and original;
  2. EMO's full model is within 0.10 nats of the standard mixture's;
  3. a random subset costs EMO 4 times as much as a chosen one, and at least 0.2 nats more;
  4. other domains' subsets minus a domain's own cost EMO at least 1.5 times what they cost the standard mixture.
The standard mixture is the better, in held-out loss, of balance weights 0.1 and 0.01.
"""

import argparse
import dataclasses
import functools
import gzip
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emo_jax.config import BalanceConfig, Config, DataConfig, ModelConfig, OptimizerConfig, PoolConfig, TrainConfig
from emo_jax.data import TokenStore

KEEPS = (32, 16, 8, 4)  # of 32 experts, the shared one included
QUARTER = 8
CALIBRATION_DOCUMENTS, TEST_DOCUMENTS = 16, 20
ENGLISH = {
    *("medical_qa", "standards", "geography", "dialogue", "math_word_problems", "economics", "scripture"),
}
SHINGLE, DUPLICATE = 8, 0.5  # words; share of a document's shingles that others have
PLAIN = {"pool.min": 3, "pool.max": 32, "pool.whole_fraction": 0.0, "pool.whole_step": 0}
POOLS_OF_8 = {"pool.min": 8, "pool.max": 8}
ARMS: dict[str, dict[str, Any]] = {
    "emo": {},
    "standard": {"pool.kind": "none"},
    "standard with balance 0.01": {"pool.kind": "none", "balance.weight": 0.01},
    "emo with pools of 8 throughout": PLAIN | POOLS_OF_8,
    "emo with pools 3 to 32": PLAIN,
    "random pools": {"pool.kind": "random"},
    "standard of 8 experts": {"pool.kind": "none", "model.num_experts": 8},
    "dense": {"pool.kind": "none", "model.num_experts": 0, "model.d_dense": 128},
}
SEARCH: dict[str, dict[str, Any]] = {
    "pools 8 to 32": PLAIN | {"pool.min": 8},
    "pools 3 to 16": PLAIN | {"pool.max": 16},
    "pools 3 to 32 with balance 0.01": PLAIN | {"balance.weight": 0.01},
    "pools 3 to 32 narrowing for half": PLAIN | {"pool.narrowing_steps": 0.5},
    "pools 3 to 32 from half on": PLAIN | {"pool.start_step": 0.5},
    "pools of 8 and half of the documents without": POOLS_OF_8 | {"pool.whole_fraction": 0.5, "pool.whole_step": 0},
    "pools of 8 and half without from 0.7 on": POOLS_OF_8 | {"pool.whole_fraction": 0.5, "pool.whole_step": 0.7},
    "pools of 8 until 0.8": POOLS_OF_8 | {"pool.whole_fraction": 1.0, "pool.whole_step": 0.8},
}
"""Looking for a full model closer to the standard mixture's at the same retention; steps as a share of all."""


def base(corpus: Path, out: Path, steps: int, seed: int) -> Config:
    """The run that every arm overrides."""
    return Config(
        model=ModelConfig(
            vocab_size=1024,
            d_model=64,
            num_layers=3,
            num_heads=2,
            num_experts=32,
            num_shared_experts=1,
            top_k=4,
            d_expert=32,
            dtype="float32",
        ),
        pool=PoolConfig(kind="document", min=8, max=8, whole_fraction=0.75, whole_step=round(0.8 * steps)),
        balance=BalanceConfig(weight=0.1, router_z_weight=1e-3),
        data=DataConfig(
            source="jsonl",
            path=str(corpus / "train.jsonl.gz"),
            cache_dir=str(out / "tokens"),
            sequence_length=256,
            batch_size=16,
            max_documents=16,
            max_document_bytes=2000,
            heldout_documents=CALIBRATION_DOCUMENTS,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_fraction=0.1),
        train=TrainConfig(steps=steps, seed=seed, eval_every=0, checkpoint_every=steps, guard_window=0),
    )


def configure(arm: dict[str, Any], corpus: Path, out: Path, steps: int, seed: int) -> Config:
    """The run of an arm."""
    config = base(corpus, out, steps, seed)
    for name, value in arm.items():
        section, field = name.split(".")
        value = round(value * steps) if field.endswith("_step") or field.endswith("_steps") else value
        setattr(config, section, dataclasses.replace(getattr(config, section), **{field: value}))
    return config


def shingles(text: str) -> set[int]:
    """Hashes of every run of eight words; of the whole text where it has fewer."""
    words = text.lower().split()
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(max(len(words) - SHINGLE + 1, 1))}


def documents(path: Path) -> Iterator[dict[str, str]]:
    """The lines of a compressed corpus."""
    with gzip.open(path, "rt") as lines:
        yield from map(json.loads, lines)


@functools.cache
def test_documents(corpus: Path) -> tuple[list[dict[str, str]], int]:
    """Documents of heldout.jsonl.gz that share less than half of their shingles with train.jsonl.gz or one another."""
    seen: set[int] = set()
    for document in documents(corpus / "train.jsonl.gz"):
        seen |= shingles(document["text"])
    kept, dropped = [], 0
    for document in documents(corpus / "heldout.jsonl.gz"):
        own = shingles(document["text"])
        if len(own & seen) < DUPLICATE * len(own):
            kept.append(document)
        else:
            dropped += 1
        seen |= own
    return kept, dropped


def test_batches(
    corpus: Path, store: TokenStore, names: Sequence[str], data: DataConfig, documents: int
) -> tuple[dict[str, Any], dict[str, int], int]:
    """Batches of the first so many test documents of each named domain, their bytes, and how many are near-duplicates.

    They are tokenized as the store's are, each cut to `data.max_document_bytes`.
    """
    from emo_jax.data import Split, domain_batches, encode

    made, dropped = test_documents(corpus)
    tokens: list[int] = []
    offsets, domains, counts, sizes = [0], [], dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    tokenizer = store.tokenizer()
    for document in sorted((d for d in made if d["domain"] in names), key=lambda d: names.index(d["domain"])):
        if counts[document["domain"]] >= documents:
            continue
        text = document["text"].encode()[: data.max_document_bytes].decode(errors="ignore")
        counts[document["domain"]] += 1
        sizes[document["domain"]] += len(text.encode())
        tokens += [*encode(tokenizer, [text])[0], store.end_of_text_id]
        offsets.append(len(tokens))
        domains.append(names.index(document["domain"]))
    split = Split(np.array(tokens), np.array(offsets), np.array(domains, np.int32))
    return domain_batches(split, names, data, 16), sizes, dropped


def measure(config: Config, run_dir: Path, corpus: Path, documents: int) -> dict[str, Any]:
    """Retention, cross-domain matrix and random subsets of a trained run, as JSON."""
    from emo_jax.data import domain_batches, open_store
    from emo_jax.modularity import measure_retention, specificity
    from emo_jax.modularity.retention import SubsetLosses
    from emo_jax.training.weights import load_parameters

    _, params, _ = load_parameters(run_dir)
    store = open_store(config.data.cache_dir)
    calibration = domain_batches(store.heldout, store.domains, config.data, 16, CALIBRATION_DOCUMENTS)
    test, sizes, dropped = test_batches(corpus, store, store.domains, config.data, documents)
    if not config.model.routed_experts:
        full = SubsetLosses(config.model, params, test).full()
        return {"full": {name: loss._asdict() for name, loss in full.items()}, "dropped": dropped, "bytes": sizes}
    keeps = [keep for keep in KEEPS if keep <= config.model.num_experts]
    result = measure_retention(
        config.model,
        params,
        calibration,
        SubsetLosses(config.model, params, test),
        keeps=keeps,
        matrix_keep=min(QUARTER, max(keeps)),
        random_seeds=3,
    )
    nats, accuracy = specificity(result)
    return {
        "full": {name: loss._asdict() for name, loss in result.full.items()},
        "kept": [[*key, loss._asdict()] for key, loss in result.kept.items()],
        "matrix": [[*key, loss._asdict()] for key, loss in result.matrix.items()],
        "specificity": nats,
        "specificity_accuracy": accuracy,
        "dropped": dropped,
        "bytes": sizes,
    }


def damage(
    result: dict[str, Any], keep: int, weighting: str, names: set[str] | None = None, method: str = "router_mass"
) -> tuple[float, float]:
    """Mean over domains of loss added and accuracy lost when a domain keeps so many experts."""
    losses, hits = [], []
    for domain, used, kept, weights, loss in result["kept"]:
        wanted = names is None or domain in names
        if wanted and used.split(" ")[0] == method and kept == keep and weights == weighting:
            losses.append(loss["loss"] - result["full"][domain]["loss"])
            hits.append(result["full"][domain]["accuracy"] - loss["accuracy"])
    return float(np.mean(losses)), float(np.mean(hits))


def mean_full(result: dict[str, Any]) -> float:
    """Mean over domains of the full model's loss."""
    return float(np.mean([loss["loss"] for loss in result["full"].values()]))


def cell(values: list[float], sign: bool = True) -> str:
    """A mean with its range; empty without values."""
    if not values:
        return ""
    form = "{:+.3f}" if sign else "{:.3f}"
    span = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
    return form.format(float(np.mean(values))) + span


def summary(results: dict[str, list[dict[str, Any]]]) -> str:
    """The tables of BUILD_NOTES.md, each cell the mean over seeds with its range."""

    lines = ["| arm | full loss | 50 % | 25 % | 12.5 % | 25 %, original weights | 25 %, random |", "|" + "---|" * 7]
    for arm, made in results.items():
        row = [arm, cell([mean_full(r) for r in made], sign=False)]
        routed = [r for r in made if "kept" in r]
        for keep, weighting, method in (
            *((keep, "renormalized", "router_mass") for keep in KEEPS[1:]),
            (QUARTER, "original", "router_mass"),
            (QUARTER, "renormalized", "random"),
        ):
            having = [r for r in routed if any(entry[2] == keep and entry[2] < 32 for entry in r["kept"])]
            values = [damage(r, keep, weighting, method=method)[0] for r in having if keep < 32]
            row.append(cell(values))
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        "| arm | accuracy, 25 % | English, 25 % | English, original | specificity, nats |",
        "|" + "---|" * 5,
    ]
    for arm, made in results.items():
        routed = [r for r in made if "kept" in r]
        if not routed:
            continue
        row = [
            arm,
            cell([-damage(r, QUARTER, "renormalized")[1] for r in routed]),
            cell([damage(r, QUARTER, "renormalized", ENGLISH)[0] for r in routed]),
            cell([damage(r, QUARTER, "original", ENGLISH)[0] for r in routed]),
            cell([r["specificity"] for r in routed]),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def figures(results: dict[str, list[dict[str, Any]]]) -> str:
    """A page with the curves of every arm that has experts to keep, bars from the lowest to the highest seed."""
    from emo_jax.analysis import page
    from emo_jax.analysis.figures import DOMAIN_COLOURS, Line, point_figure

    arms = {name: made for name, made in results.items() if any(e[2] == max(KEEPS) for e in made[0].get("kept", ()))}
    colours = dict(zip(arms, DOMAIN_COLOURS, strict=False))
    legend = page.legend("arm", [(name, name, colour) for name, colour in colours.items()])
    cards = []
    for place, (title, weighting, index, names) in enumerate(
        (
            ("Nats added", "renormalized", 0, None),
            ("Nats added, original weights", "original", 0, None),
            ("Accuracy lost", "renormalized", 1, None),
            ("Nats added, English prose alone", "renormalized", 0, ENGLISH),
        )
    ):
        lines = []
        for name, made in arms.items():
            values = np.array([[damage(r, keep, weighting, names)[index] for keep in KEEPS] for r in made])
            spread = {"low": values.min(0).tolist(), "high": values.max(0).tolist()} if len(made) > 1 else {}
            lines.append(Line(name, KEEPS, values.mean(0).tolist(), colours[name], name, **spread))
        figure = point_figure(f"figure{place}", lines, x_title="experts kept of 32, the shared one included")
        seeds = max(map(len, arms.values()))
        cards.append(page.card(title, figure, f"Mean over the domains; bars: lowest and highest of {seeds} seeds."))
    body = page.section("Keep only the experts a domain needs", "No fine-tuning, no pools.", cards, legend)
    return page.page("Is it modular?", body)


def verdict(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Each criterion of this file's docstring, with its numbers."""

    def full(arm: list[dict[str, Any]]) -> float:
        return float(np.mean([mean_full(result) for result in arm]))

    def line(good: bool, text: str) -> str:
        return f"{'pass' if good else 'FAIL'}  {text}"

    standard = min(results["standard"], results["standard with balance 0.01"], key=full)
    emo = results["emo"]
    lines = []
    for names, where in ((None, "all domains"), (ENGLISH, "English prose")):
        for weighting in ("renormalized", "original"):
            for index, what in enumerate(("nats", "accuracy")):
                ours, theirs = ([damage(r, QUARTER, weighting, names)[index] for r in arm] for arm in (emo, standard))
                good = np.mean(ours) <= np.mean(theirs) / 4 and max(ours) < min(theirs)
                text = f"25 % kept, {where}, {weighting}: EMO loses {np.mean(ours):.3f} "
                text += f"({min(ours):.3f} to {max(ours):.3f}) {what}, standard {np.mean(theirs):.3f} "
                lines.append(line(good, text + f"({min(theirs):.3f} to {max(theirs):.3f})"))
    gap = full(emo) - full(standard)
    lines.append(line(gap <= 0.1, f"full model: EMO is {gap:+.3f} nats from the standard mixture"))
    chosen = np.mean([damage(r, QUARTER, "renormalized")[0] for r in emo])
    random = np.mean([damage(r, QUARTER, "renormalized", method="random")[0] for r in emo])
    good = random >= 4 * chosen and random - chosen >= 0.2
    lines.append(line(good, f"a random quarter costs EMO {random:.3f} nats, a chosen one {chosen:.3f}"))
    ours, theirs = (np.mean([r["specificity"] for r in arm]) for arm in (emo, standard))
    lines.append(line(ours >= 1.5 * theirs, f"specificity: EMO {ours:.3f} nats, standard {theirs:.3f}"))
    return lines


def study_flags(description: str, arms: Iterable[str]) -> argparse.ArgumentParser:
    """What each study of these runs is asked with; `arms` are those by default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--corpus", type=Path, help="folder of the texts")
    parser.add_argument("--out", type=Path, default=Path("runs/modularity"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="of 4096 tokens")
    parser.add_argument("--arms", default=",".join(arms), help=f"of {', '.join(ARMS | SEARCH)}")
    return parser


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Where the run of an arm lies."""
    return out / f"{arm.replace(' ', '_')}-{seed}"


def main() -> None:
    """Trains what is not trained yet, measures what is not measured yet, prints the tables."""
    parser = study_flags(__doc__.splitlines()[0], ARMS)
    parser.add_argument("--documents", type=int, default=TEST_DOCUMENTS, help="test documents of a domain")
    args = parser.parse_args()
    if args.corpus is None:
        print("Needs texts of labelled domains: --corpus=DIR with train.jsonl.gz and heldout.jsonl.gz.")
        return
    from emo_jax.training import train

    results: dict[str, list[dict[str, Any]]] = {}
    for seed, name in itertools.product(range(args.seeds), args.arms.split(",")):
        config = configure((ARMS | SEARCH)[name], args.corpus, args.out, args.steps, seed)
        folder = run_folder(args.out, name, seed)
        file = folder / "retention.json"
        if not file.exists():
            start = time.perf_counter()
            train(config, folder, log=lambda text: None)
            trained = time.perf_counter() - start
            file.write_text(json.dumps(measure(config, folder, args.corpus, args.documents)))
            print(f"{name}, seed {seed}: trained in {trained:.0f} s, {time.perf_counter() - start:.0f} s", flush=True)
        results.setdefault(name, []).append(json.loads(file.read_text()))
    judged = {"emo", "standard", "standard with balance 0.01"} <= set(results)
    tables = summary(results) + "\n\n" + "\n".join(verdict(results) if judged else []) + "\n"
    (args.out / "results.md").write_text(tables)
    (args.out / "results.html").write_text(figures(results))
    print(tables)


if __name__ == "__main__":
    main()
