"""How good is a model, or a subset of it: `python -m emo_jax.evaluate --model=RUN --data=heldout.jsonl.gz`.

Prints loss, next-token accuracy and bits per byte by domain, without document pools. With `--keep=32,16,8` it chooses
that many experts for each domain on the texts of `--calibration` and prints what each size retains and the cross-domain
matrix. With `--pools=8,16` it prints what a text loses when its first tokens choose the routed experts that it may use
(`emo_jax.generate --pool`), and how many expert uses a cache of experts would answer. Without `--data` a run is tested
on its own held-out documents, and chooses on those it trained on. `--subset=FILE` evaluates the kept experts beside the
full model, `--ablate=FILE` all but them; `--tasks=NAMES` runs benchmarks of lm-evaluation-harness (and nothing else,
unless `--data`, `--keep` or `--pools` ask for it). Several models, `--model=A,B`, are compared on one page.

Tables go to `--out` (evaluation.json, evaluation.csv, and retention.html), which is the run directory if not given; its
report.html then shows them.
"""

import json
from pathlib import Path

from absl import flags

from emo_jax import cli
from emo_jax.errors import require, require_choice

_MODEL = flags.DEFINE_list("model", None, "Run directories or Hugging Face folders.", required=True)
_DATA = flags.DEFINE_string("data", "", "Test texts: JSON lines. Empty: a run's own held-out documents.")
_SUBSET = flags.DEFINE_string("subset", "", "A subset's file: keep its experts.")
_ABLATE = flags.DEFINE_string("ablate", "", "A subset's file: keep all but its experts.")
_WEIGHTS = flags.DEFINE_string(
    "weights", "renormalized", "Of the experts that --subset keeps: renormalized or original."
)
_CALIBRATION = flags.DEFINE_string("calibration", "", "Texts of the same domains to choose subsets on.")
_KEEP = flags.DEFINE_list("keep", [], "Sizes of subsets, shared experts included.")
_MATRIX = flags.DEFINE_integer("matrix_keep", 0, "Size that the matrix is made for, one of --keep; 0: the last.")
_METHODS = flags.DEFINE_list("methods", ["router_mass"], "Criteria that choose them; random is one.")
_DOCUMENTS = flags.DEFINE_integer("documents", 0, "Use the first so many texts of each domain; 0: all.")
_CALIBRATE = flags.DEFINE_list("calibration_documents", ["25"], "The same of the calibration texts; several: compared.")
_SEQUENCE = flags.DEFINE_integer("sequence_length", 1024, "Tokens in a row, of --data and --calibration.")
_POOLS = flags.DEFINE_list("pools", [], "Sizes, in routed experts, of pools that a text's first tokens choose.")
_PROMPTS = flags.DEFINE_list("prompts", ["16", "32", "64", "128"], "How many first tokens choose them.")
_TASKS = flags.DEFINE_list("tasks", [], "Benchmarks, by their names in lm-evaluation-harness.")
_TASK_PATH = flags.DEFINE_string("task_path", "", "Folder of further task files.")
_FEWSHOT = flags.DEFINE_integer("fewshot", -1, "Examples in a prompt; -1: as each task has it.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Use the first so many examples of each task; 0: all.")
_OUT = flags.DEFINE_string("out", "", "Folder for the tables; empty: that of the run.")


def main() -> int:
    """Evaluates, prints tables and writes them."""
    require_choice("--weights", _WEIGHTS.value, ("renormalized", "original"))
    require(not (_SUBSET.value and _ABLATE.value), "--subset and --ablate are both given; give one.")
    keeps, counts = _numbers("keep", _KEEP.value), _numbers("calibration_documents", _CALIBRATE.value)
    pools, prompts = _numbers("pools", _POOLS.value), _numbers("prompts", _PROMPTS.value)
    require(bool(counts), "--calibration_documents is empty; give a number, 0 for all.")
    require(
        bool(keeps or pools) or not _CALIBRATION.value,
        f"--calibration={_CALIBRATION.value!r} is for choosing experts; give --keep=SIZES or --pools=SIZES too.",
    )
    from emo_jax.api import load
    from emo_jax.modularity import Subset, tables
    from emo_jax.modularity.evaluation import TITLES, Texts, evaluate_model

    file = _SUBSET.value or _ABLATE.value
    require(not file or len(_MODEL.value) == 1, f"{file} is a subset of one model; --model names {len(_MODEL.value)}.")
    subset = Subset.load(file) if file else None
    renormalized, ablate = _WEIGHTS.value == "renormalized", bool(_ABLATE.value)
    made: dict[str, dict[str, tables.Table]] = {}
    fingerprints: dict[str, str] = {}
    for path, name in zip(_MODEL.value, _names(_MODEL.value), strict=True):
        model = load(path)
        fingerprints[name], made[name] = model.fingerprint, {}
        print(f"\n{name}")
        if _TASKS.value:  # first, since a name may be wrong
            from emo_jax.evaluation.harness import run_tasks

            confined = model.apply_subset(subset, renormalized=renormalized, ablate=ablate)
            made[name]["tasks"] = run_tasks(
                confined, _TASKS.value, task_path=_TASK_PATH.value, fewshot=_FEWSHOT.value, limit=_LIMIT.value
            )
        if not _TASKS.value or _DATA.value or keeps or pools:
            texts = Texts(
                model, Path(path), data=_DATA.value, calibration=_CALIBRATION.value, sequence_length=_SEQUENCE.value
            )
            made[name] |= evaluate_model(
                model,
                texts,
                keeps=keeps,
                matrix_keep=_MATRIX.value,
                methods=_METHODS.value,
                documents=_DOCUMENTS.value,
                calibration_documents=counts,
                subset=subset,
                ablate=ablate,
                renormalized=renormalized,
                pools=pools,
                prompts=prompts,
            )
        for key, table in made[name].items():
            print(f"\n{TITLES[key]}\n\n{tables.as_text(table)}")
    retention = {name: new["retention"] for name, new in made.items() if "retention" in new}
    if len(retention) > 1:
        print(f"\nMeans over the domains\n\n{tables.as_text(tables.summary_table(retention))}")
    _write(made, fingerprints)
    return 0


def _write(made: dict[str, dict[str, list]], fingerprints: dict[str, str]) -> None:
    """Leaves tables and figures in `--out`, or in the one run's directory, beside earlier ones of the same weights."""
    from emo_jax.analysis import EVALUATION_FILE, retention_page, write_page, write_report
    from emo_jax.modularity import tables

    runs = [Path(path) for path in _MODEL.value]
    of_a_run = len(runs) == 1 and (runs[0] / "metrics.jsonl").is_file()
    if not _OUT.value and not of_a_run:
        return
    folder = Path(_OUT.value) if _OUT.value else runs[0]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / EVALUATION_FILE
    before = json.loads(file.read_text()) if file.is_file() else {"models": {}, "fingerprints": {}}
    models = {
        name: (before["models"][name] if before["fingerprints"].get(name) == fingerprints[name] else {}) | new
        for name, new in made.items()
    }
    file.write_text(json.dumps({"fingerprints": fingerprints, "models": models}, indent=1) + "\n")
    (folder / "evaluation.csv").write_text(tables.as_csv(models))
    page = write_page(folder / "retention.html", retention_page(models)) if _OUT.value else write_report(folder)
    print(f"\nTables: {file}, {folder / 'evaluation.csv'}\nFigures: {page}")


def _numbers(flag: str, values: list[str]) -> list[int]:
    require(all(value.isdigit() for value in values), f"--{flag}={','.join(values)!r} must be numbers, as in 32,16,8.")
    return [int(value) for value in values]


def _names(paths: list[str]) -> list[str]:
    """Names of the folders; whole paths where those are not unique."""
    names = [Path(path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


if __name__ == "__main__":
    cli.run(main)
