"""Rewrites a run's report, or compares runs: `python -m emo_jax.report --runs=A,B --out=compare.html`."""

from pathlib import Path

from absl import flags

from emo_jax import cli
from emo_jax.errors import require

_RUNS = flags.DEFINE_list("runs", None, "Run directories: one, or several to compare.", required=True)
_OUT = flags.DEFINE_string("out", "", "The page that compares runs.")


def main() -> int:
    """Writes the page and prints where it lies."""
    from emo_jax.analysis import compare_runs, write_report

    runs = [Path(run) for run in _RUNS.value]
    require(
        (len(runs) > 1) == bool(_OUT.value),
        f"--runs names {len(runs)} run{'s' * (len(runs) != 1)} and --out is {_OUT.value!r}: one run's report stays in "
        "its folder, a comparison needs --out=FILE.html.",
    )
    print(compare_runs(runs, Path(_OUT.value)) if _OUT.value else write_report(runs[0]))
    return 0


if __name__ == "__main__":
    cli.run(main)
