"""The page that lays runs side by side, and the command that writes it."""

import json
import subprocess
import sys

import pytest

from emo_jax.analysis import compare_runs
from emo_jax.errors import UserError
from tests.analysis.test_report import HOSTILE, config, figures, own_html, run_directory, simulate


@pytest.fixture
def runs(tmp_path):
    emo, standard = config("document"), config("none")
    standard.balance.weight = 0.01
    kinds = {"emo": emo, "std": standard}
    return [run_directory(tmp_path / name, made, simulate(made, every=5)) for name, made in kinds.items()]


def test_a_comparison_shows_what_differs_and_what_came_of_it(runs, tmp_path):
    out = compare_runs(runs, tmp_path / "compare.html")
    text = own_html(out)
    assert "emo" in text and "std" in text and "EMO" in text and "Standard MoE" in text
    assert "pool.kind" in text and "balance.weight" in text and "optimizer.learning_rate" not in text
    assert "do not compare" in text
    assert len(figures(text)) == 10
    last = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1] for run in runs]
    first, second = (line["heldout"]["domains"]["python"]["loss"] for line in last)
    assert f"{second:.3f} ({second - first:+.3f})" in text


def test_names_that_are_equal_become_paths_and_hostile_ones_text(runs, tmp_path):
    twin = tmp_path / "other" / "emo"
    twin.parent.mkdir()
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    record["heldout"]["domains"][HOSTILE] = {"loss": 1.0, "tokens": 5}
    run_directory(twin, config("document"), [*map(json.loads, lines[:-1]), record])
    text = own_html(compare_runs([runs[0], twin], tmp_path / "compare.html"))
    assert str(twin) in text and str(runs[0]) in text
    assert HOSTILE not in text and "&lt;script&gt;" in text


def test_runs_without_a_common_evaluation_or_any_step(runs, tmp_path):
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    early = run_directory(tmp_path / "early", config("none"), [line for line in lines if "heldout" not in line][:9])
    assert "no evaluation at the same step" in own_html(compare_runs([runs[0], early], tmp_path / "compare.html"))
    nothing = run_directory(tmp_path / "nothing", config("none"), [])
    with pytest.raises(UserError, match="nothing has logged no step yet"):
        compare_runs([runs[0], nothing], tmp_path / "compare.html")


def test_the_command_compares_or_rewrites_and_says_where(runs, tmp_path):
    def report(*flags):
        return subprocess.run([sys.executable, "-m", "emo_jax.report", *flags], capture_output=True, text=True)

    done = report(f"--runs={runs[0]},{runs[1]}", f"--out={tmp_path / 'c.html'}")
    assert done.stdout == f"{tmp_path / 'c.html'}\n" and (tmp_path / "c.html").stat().st_size > 10_000
    assert report(f"--runs={runs[0]}").stdout == f"{runs[0] / 'report.html'}\n"
    refused = report(f"--runs={runs[0]},{runs[1]}")
    assert refused.returncode == 2 and "a comparison needs --out=FILE.html" in refused.stderr
