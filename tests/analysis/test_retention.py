"""Pages about what survives: their numbers, and how a browser lays them out."""

import json

import numpy as np

from emo_jax.analysis import EVALUATION_FILE, retention_page, write_page, write_report
from emo_jax.modularity.tables import RETENTION_HEAD, SPECIFICITY
from tests.analysis.test_report import (
    HOSTILE,
    config,
    figures,
    open_in_a_browser,
    own_html,
    run_directory,
    simulate,
)

DOMAINS = ("python", "man pages", HOSTILE, "a-domain-whose-name-never-ends-" * 4)


def tables(damage: float, methods=("router_mass",)):
    """What an evaluation leaves of a model that loses so much a halving."""
    retention = [list(RETENTION_HEAD)]
    for domain in (*DOMAINS, "mean"):
        for method in methods:
            for halvings, keep in enumerate((32, 16, 8, 4)):
                retention.append([domain, method, keep, 3.0, damage * halvings, damage * halvings / 2, halvings / 100])
    values = damage * (1 + np.arange(len(DOMAINS) ** 2).reshape(len(DOMAINS), -1))
    matrix = [["chosen for", *DOMAINS], *([name, *row.tolist()] for name, row in zip(DOMAINS, values, strict=True))]
    return {
        "losses": [
            ["domain", "loss", "accuracy", "bits per byte", "tokens"],
            *([d, 3.0, 0.3, 1.2, 99] for d in DOMAINS),
        ],
        "retention": retention,
        "matrix": [*matrix, [SPECIFICITY, 0.123]],
    }


def test_a_page_shows_every_model_and_opens_in_a_browser(tmp_path):
    models = {"emo": tables(0.01, ("router_mass", "random")), "std": tables(0.2), HOSTILE: tables(0.1)}
    models["emo"]["calibration"] = [
        ["domain", "method", "documents", "renormalized", "original"],
        ["python", "router_mass", 1, 0.5, 0.4],
        ["mean", "router_mass", 1, 0.456, 0.4],
        ["mean", "router_mass", 0, 0.3, 0.2],
    ]
    for name, added in (("emo", 0.02), (HOSTILE, 0.3)):
        pools = [[size, f"{n} tokens", added * 16 / n, added] for size in ("8", "16") for n in (16, 64)]
        pools += [["8", "whole text (oracle)", added / 9, added], ["8", "other texts (subset)", 0.789, added]]
        models[name]["pools"] = [["experts", "chosen by", "mean", "python"], *pools]
        models[name]["cache"] = [["experts cached", "all experts", "pool of 8"], [4, 0.3, 0.5], [31, 1.0, 1.0]]
    models["std"]["tasks"] = [["task", "metric", "value", "standard error", "examples"], ["six", "acc", 0.517, "", 6]]
    page = write_page(tmp_path / "retention.html", retention_page(models))
    text = own_html(page)
    assert len(figures(text)) == 4 + len(models) + 2
    for words in (
        "Off the diagonal minus on it: 0.123",
        "+0.600",
        "0.456",
        "<td class=number>all</td>",
        "0.517",
        "0.789",
    ):
        assert words in text, words
    assert "<script>alert" not in text

    run = config()
    folder = run_directory(tmp_path / "run", run, simulate(run, every=20))
    before = write_report(folder).read_text()
    (folder / EVALUATION_FILE).write_text(json.dumps({"models": {"any": tables(0.05)}}))
    report = write_report(folder)
    assert "Keep only the experts a domain needs" in own_html(report) and "Keep only the experts" not in before
    open_in_a_browser([page, report])
