"""Do experts follow domains? `python benchmarks/specialisation.py --corpus=DIR --out=DIR`.

DIR of --corpus holds train.jsonl.gz and heldout.jsonl.gz; --out has the runs of `benchmarks/modularity.py`, which are
trained where they are missing. Read are 100 tokens of 1,000 held-out documents; clusters are 32. Each number is the
mean over seeds, with its range. Measurements are kept beside the runs.

The bar, set before any run: token clusters of EMO agree with domains (NMI) at least twice as well as a standard
mixture's, and better than chance, on English prose too. Both standard mixtures of that study are shown: `standard` has
EMO's balance weight, 0.1; with 0.01 the held-out loss is lower, and experts are freer to take sides without pools, too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from modularity import ARMS, ENGLISH, SEARCH, configure, run_folder, study_flags

COMPARED = ("emo", "standard", "standard with balance 0.01", "emo with pools 3 to 32")
ROWS = (
    ("token clusters, NMI", lambda m: m["clusters"]["nmi"]),
    ("the same, documents permuted", lambda m: m["clusters"]["permuted"]["nmi"][0]),
    ("the same, first layer alone", lambda m: m["by_layer"][0]),
    ("the same, last layer alone", lambda m: m["by_layer"][-1]),
    ("document clusters, NMI", lambda m: m["document_clusters"]["nmi"]),
    ("I(expert; domain) / H(expert)", lambda m: m["mutual"]["domain"]),
    ("I(expert; token) / H(expert)", lambda m: m["mutual"]["token"]),
    ("I(expert; domain given token) / H(expert)", lambda m: m["mutual"]["domain_given_token"]),
)


def measured(run: Path, corpus: Path) -> dict[str, Any]:
    """The numbers of `emo_jax.explore`, of all domains and of prose, with the NMI of each layer's own clusters."""
    from emo_jax.analysis.clusters import cluster
    from emo_jax.analysis.exploration import measure, plain
    from emo_jax.analysis.information import agreement
    from emo_jax.analysis.reading import choose_documents, label, read_routers, read_texts
    from emo_jax.api import load

    documents = choose_documents(read_texts(str(corpus / "heldout.jsonl.gz")), 1000, 0)
    reading = read_routers(load(run), documents, 100, run.name)
    _, numbers = measure(reading, documents, clusters=32, prose=ENGLISH, seed=0)
    prose_N = np.isin([documents[n].domain for n in reading.document_N], sorted(ENGLISH))
    for part, of in ((reading, numbers), (reading.select(prose_N), numbers["prose"])):
        domain_N = label(part, documents).domain_N
        own = [cluster([probability_NR], 32, 0).label_N for probability_NR in part.probability_LNR]
        of["by_layer"] = [agreement(label_N, domain_N)["nmi"] for label_N in own]
        del of["layers"]
    return plain(numbers)


def main() -> None:
    """Trains and measures what is missing, prints the table."""
    args = study_flags(__doc__.splitlines()[0], COMPARED).parse_args()
    if args.corpus is None:
        print("Needs texts of labelled domains: --corpus=DIR with train.jsonl.gz and heldout.jsonl.gz.")
        return
    from emo_jax.training import train

    results: dict[str, list[dict[str, Any]]] = {}
    for arm in args.arms.split(","):
        for seed in range(args.seeds):
            run = run_folder(args.out, arm, seed)
            file = run / "specialisation.json"
            if not file.exists():
                train(
                    configure((ARMS | SEARCH)[arm], args.corpus, args.out, args.steps, seed), run, log=lambda text: None
                )
                file.write_text(json.dumps(measured(run, args.corpus)))
            results.setdefault(arm, []).append(json.loads(file.read_text()))
    for part in ("", "prose"):
        print(f"\n| {part or 'all domains'} | {' | '.join(results)} |\n|{'---|' * (1 + len(results))}")
        for name, value in ROWS:
            cells = []
            for made in results.values():
                values = [value(numbers[part] if part else numbers) for numbers in made]
                span = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.3f}{span}")
            print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
