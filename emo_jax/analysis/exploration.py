"""Models side by side on the same documents: all that `emo_jax.explore` measures, as one JSON file and a short table.

Letters: see `specialisation`.
"""

import contextlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emo_jax.analysis import specialisation
from emo_jax.analysis.clusters import Clusters, cluster
from emo_jax.analysis.information import agreement_and_chance, expert_information
from emo_jax.analysis.reading import (
    Labels,
    Reading,
    Text,
    choose_documents,
    document_means,
    label,
    read_routers,
    read_texts,
)
from emo_jax.analysis.report import write_page
from emo_jax.data import Document, first_documents
from emo_jax.errors import require, require_choice
from emo_jax.modularity import tables
from emo_jax.modularity.evaluation import run_store

ANALYSIS_FILE = "analysis.json"
FORMAT_VERSION = 1
_MEASURES = ("domain", "token", "domain_given_token")


def explore(
    paths: Sequence[str],
    data: str,
    out: Path,
    *,
    clusters: int = 32,
    tokens: int = 100,
    documents: int = 1000,
    seed: int = 0,
    prose: Sequence[str] = (),
    with_saturation: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Reads, measures and compares models, and writes `ANALYSIS_FILE`, figures and the page into a folder.

    Args:
      paths: of the models.
      data: see `read_texts`; empty: the held-out documents of the first model's run.
      out: the folder; made where there is none.
      clusters: of tokens.
      tokens: read of each document.
      documents: most of them; 0: all.
      seed: of the choice of documents, of clusters and shuffles.
      prose: domains that are measured again by themselves.
      with_saturation: compare a run's earlier checkpoints with its last.
      log: receives the tables and a line for each thing that takes long.

    Raises:
      UserError: where a model or a text cannot be read, or an argument cannot work.
    """
    from emo_jax.analysis.explorer import Explored, write_explorer
    from emo_jax.analysis.plots import write_figures
    from emo_jax.api import load

    names = model_names(paths)
    require(out.is_dir() or not out.exists(), f"--out={out} is a file; name a folder.")
    texts = choose_documents(read_texts(data) if data else _heldout(Path(paths[0])), documents, seed)
    counts = Counter(text.domain for text in texts)
    for domain in prose:
        require_choice("--prose", domain, sorted(counts))
    require(len(set(prose)) != 1, f"--prose={prose[0] if prose else ''} is one domain; give two or more, or none.")
    out.mkdir(parents=True, exist_ok=True)
    log(f"{len(texts):,} documents of {len(counts)} domains")
    readings, saturations = [], []
    for path, name in zip(paths, names, strict=True):  # all, before what takes long: one may not be readable
        log(f"{name}: reading")
        readings.append(read_routers(load(path), texts, tokens, name))
        if skipped := len(texts) - len(np.unique(readings[-1].document_N)):
            log(f"  {skipped:,} documents have no token and are left out")
        saturations.append(
            _saturation_of_run(Path(path), readings[-1], texts, tokens, log) if with_saturation else None
        )
    models = []
    for reading, saturated in zip(readings, saturations, strict=True):
        log(f"{reading.name}: {len(reading.token_N):,} tokens, clusters and information")
        own, numbers = measure(reading, texts, clusters=clusters, prose=prose, seed=seed)
        models.append(Explored(reading, own, plain(numbers | {"saturation": saturated})))
    settings = {"clusters": clusters, "tokens": tokens, "documents": documents, "seed": seed, "prose": list(prose)}
    described = {"path": data or f"held out by {names[0]}", "documents": len(texts)}
    described["documents_per_domain"] = dict(sorted(counts.items()))
    every = [model.numbers for model in models]
    for part, title in (("", "All text"), ("prose", "Prose alone")):
        if table := summary(every, title, part):
            log(f"\n{tables.as_text(table)}")
    log(f"\nNumbers: {write_analysis(out, every, described, settings)}")
    log(f"Figures: {write_figures(out / 'figures', every)}")
    log(f"Page:    {write_explorer(out / 'explore.html', texts, models, prose)}")


def measure(
    reading: Reading, documents: Sequence[Text], *, clusters: int, prose: Collection[str], seed: int
) -> tuple[Clusters, dict[str, Any]]:
    """The clusters of a model's tokens, and its part of the analysis.

    Args:
      reading: of the documents.
      documents: all of them.
      clusters: K, of tokens; of documents at most as many as differ.
      prose: domains that are measured again by themselves, clustered anew; none: no such numbers.
      seed: of the clusters and of everything that is left to chance.

    Returns:
      `name`, `tokens` and `documents` (numbers by domain), `domains`, and
      `clusters`: of tokens: `size` and what PCA kept, with what `agreement_and_chance` returns;
      `document_clusters`: the same of documents;
      `mutual`: what `expert_information` returns, of each measure its `share`, mean over the layers;
      `layers`: what `specialisation.layers` returns, with `mutual` of each;
      `prose`: `domains`, `clusters`, `document_clusters`, `mutual` and `layers` with `mutual` alone, of prose.
      What needs domains is None where there are fewer than two.
    """
    labels = label(reading, documents)
    own, numbers = _structure(reading, labels, clusters, seed)
    layers = [
        part | mutual for part, mutual in zip(specialisation.layers(reading, labels), numbers["layers"], strict=True)
    ]
    numbers |= {"name": reading.name, "layers": layers, "prose": None}
    prose_N = np.isin(np.array(labels.names)[labels.domain_N], sorted(prose))
    if prose_N.any():
        part = reading.select(prose_N)
        numbers["prose"] = _structure(part, label(part, documents), clusters, seed)[1]
    return own, numbers


def _structure(reading: Reading, labels: Labels, clusters: int, seed: int) -> tuple[Clusters, dict[str, Any]]:
    """What is measured of all tokens and again of prose."""
    tokens = cluster(reading.probability_LNR, clusters, seed)
    means_LMR = document_means(reading)
    documents = len(labels.domain_M)
    of_documents = cluster(means_LMR, clusters, seed, fewer=True)
    alone = labels._replace(document_N=np.arange(documents))  # each document is one point
    mutual: list[dict[str, Any] | None] = [None] * len(means_LMR)
    if len(labels.names) > 1:
        mutual = [
            expert_information(chosen_NC, reading.token_N, labels, probability_NR.shape[1], seed)
            for chosen_NC, probability_NR in zip(reading.chosen_LNC, reading.probability_LNR, strict=True)
        ]
    shares = {name: [layer[name]["share"] for layer in mutual if layer] for name in _MEASURES}
    numbers = {
        "domains": labels.names,
        "tokens": dict(zip(labels.names, np.bincount(labels.domain_N).tolist(), strict=True)),
        "documents": dict(zip(labels.names, np.bincount(labels.domain_M).tolist(), strict=True)),
        "clusters": _of_clusters(tokens, labels, seed),
        "document_clusters": _of_clusters(of_documents, alone, seed),
        "mutual": {name: float(np.mean(values)) for name, values in shares.items()} if mutual[0] else None,
        "layers": [{"mutual": layer} for layer in mutual],
    }
    return tokens, numbers


def _of_clusters(own: Clusters, labels: Labels, seed: int) -> dict[str, Any]:
    found = agreement_and_chance(own.label_N, labels, seed) if len(labels.names) > 1 else {}
    return found | {"size": own.size_K, "variance": own.variance, "dimensions": own.dimensions}


def summary(models: Sequence[dict[str, Any]], title: str, part: str = "") -> tables.Table:
    """The main numbers, a column a model; of all text, or of its `part` "prose".

    Empty where there is nothing to compare domains by.
    """
    numbers = [model[part] if part else model for model in models]
    if not all(one and one["mutual"] for one in numbers):
        return []
    table: tables.Table = [[title, *(model["name"] for model in models)]]
    for kind, of in (("clusters", "token clusters"), ("document_clusters", "document clusters")):
        found = [one[kind] for one in numbers]
        for name, shown in (("nmi", "NMI with domains"), ("ari", "ARI"), ("purity", "purity")):
            table.append([f"{of}: {shown}", *(one[name] for one in found)])
            table.append(["  documents' domains permuted", *(one["permuted"][name][0] for one in found)])
    for name, shown in zip(_MEASURES, ("domain", "token", "domain | token"), strict=True):
        table.append([f"I(expert; {shown}) / H(expert)", *(one["mutual"][name] for one in numbers)])
    return table


def write_analysis(
    folder: Path, models: Sequence[dict[str, Any]], data: dict[str, Any], settings: dict[str, Any]
) -> Path:
    """Writes `ANALYSIS_FILE`: `version`, `data`, `settings` and `models`; numbers have six digits, and all are finite.

    An earlier file is replaced at once.
    """
    value = {"version": FORMAT_VERSION, "data": data, "settings": settings, "models": list(models)}
    return write_page(folder / ANALYSIS_FILE, json.dumps(plain(value), ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """Nested values as JSON has them: lists, floats of six digits, None for what is no number."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def model_names(paths: Sequence[str]) -> list[str]:
    """The ends of the paths, with as many folders as it takes to tell them apart.

    Raises:
      UserError: where a model is named twice.
    """
    parts = [Path(path).resolve().parts for path in paths]
    require(len(set(parts)) == len(parts), f"--models={','.join(paths)} names a model twice.")
    depth = next(n for n in range(1, max(map(len, parts)) + 1) if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


def _heldout(run: Path) -> Iterator[Document]:
    """The held-out documents of a run, as far as it kept them."""
    store, _ = run_store(run)
    return store.documents(first_documents(store.heldout, store.domains))


def _saturation_of_run(
    run: Path, last: Reading, documents: Sequence[Text], tokens: int, log: Callable[[str], None]
) -> dict[int, list[float]]:
    """Router saturation of each layer, at each earlier checkpoint that a run has kept.

    Raises:
      UserError: where it has kept no other.
    """
    from emo_jax.api import load
    from emo_jax.training.checkpoints import saved_steps  # here, because Orbax takes seconds to import

    steps = saved_steps(run)
    require(
        len(steps) > 1,
        f"--saturation needs several checkpoints, and {run} has {len(steps)}; train with a larger "
        "train.checkpoints_kept, or leave --saturation out.",
    )
    result = {}
    for step in steps[:-1]:
        with _at_step(run, step) as folder:
            early = read_routers(load(folder), documents, tokens, f"{last.name} at step {step}")
        result[step] = specialisation.saturation(early, last)
        log(f"  at step {step:,}, {np.mean(result[step]):.0%} of the choices that it makes at step {steps[-1]:,}")
    return result


@contextlib.contextmanager
def _at_step(run: Path, step: int) -> Iterator[Path]:
    """A run as it was at an earlier checkpoint: a folder of links, since a run is read at its newest."""
    with tempfile.TemporaryDirectory() as made:
        folder, run = Path(made), run.resolve()
        (folder / "checkpoints").mkdir()
        os.symlink(run / "checkpoints" / str(step), folder / "checkpoints" / str(step))
        for name in ("config.json", "tokenizer.json"):
            os.symlink(run / name, folder / name)
        yield folder
