"""Chooses the experts a task needs: `python -m emo_jax.select --model=RUN --data=task.jsonl --keep=32 --out=task.json`.

The data are JSON lines with `text`, or with `prompt` and `answer` (then only the answers' tokens count, unless
`--tokens=all`). Several files are several tasks, which count alike. ESFT's choice is
`--method=gate --budget=mass --mass=0.2`. Subsets are put together with
`--compose=union --subsets=a.json,b.json --out=both.json`.
"""

import hashlib
from pathlib import Path

from absl import flags

from emo_jax import cli
from emo_jax.errors import UserError, require, require_choice

_MODEL = flags.DEFINE_string("model", "", "Run directory or Hugging Face folder.")
_DATA = flags.DEFINE_list("data", [], "Calibration files, one a task; several tasks count alike.")
_OUT = flags.DEFINE_string("out", None, "The subset's file.", required=True)
_KEEP = flags.DEFINE_integer("keep", 0, "Experts to keep in a layer, the shared ones included.")
_METHOD = flags.DEFINE_string("method", "router_mass", "Criterion, or random.")
_BUDGET = flags.DEFINE_string("budget", "uniform", "uniform, variable (over layers), or mass.")
_MASS = flags.DEFINE_float("mass", 0.0, "With --budget=mass: share of each layer's score to keep.")
_GREEDY = flags.DEFINE_bool(
    "greedy", True, "Layer by layer on the already cut model (one task, not --budget=variable)."
)
_TOKENS = flags.DEFINE_string("tokens", "answers", "Which count: answers (of a text all), or all, prompts included.")
_DOMAIN = flags.DEFINE_string("domain", "", "Use only examples of this domain.")
_DOCUMENTS = flags.DEFINE_integer("documents", 0, "Use the first so many examples of each file; 0: all.")
_SEQUENCE = flags.DEFINE_integer("sequence_length", 1024, "Tokens in a row.")
_SEED = flags.DEFINE_integer("seed", 0, "Of --method=random.")
_COMPOSE = flags.DEFINE_string("compose", "", "union, intersection or difference of --subsets.")
_SUBSETS = flags.DEFINE_list("subsets", [], "Subset files to compose.")


def main() -> int:
    """Writes the subset and prints what it keeps."""
    subset = _composed() if _COMPOSE.value else _selected()
    Path(_OUT.value).parent.mkdir(parents=True, exist_ok=True)
    Path(_OUT.value).write_text(subset.to_json())
    counts = [len(experts) for experts in subset.experts]
    span = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    print(f"{_OUT.value}: {span} routed experts in each of {len(counts)} mixture layers ({subset.method}).")
    return 0


def _composed():
    from emo_jax.modularity import Subset, compose

    require(not _MODEL.value and not _DATA.value, "--compose works on --subsets alone; drop --model and --data.")
    subset, shared = compose(_COMPOSE.value, [Subset.load(path) for path in _SUBSETS.value])
    for layer, share in enumerate(shared):
        print(f"  mixture layer {layer}: {share:.0%} of the experts in any of them are in all of them")
    return subset


def _selected():
    require(bool(_MODEL.value), "--model is empty; give a run directory or a Hugging Face folder, or --compose.")
    random = _METHOD.value == "random"
    require(random or bool(_DATA.value), "--data is empty; give the texts of the task, or --method=random.")
    require_choice("--tokens", _TOKENS.value, ("answers", "all"))
    for path in _DATA.value:
        require(bool(path), "--data holds an empty name.")
    from tokenizers import Tokenizer

    from emo_jax.api import load
    from emo_jax.data import example_batches, read_examples
    from emo_jax.modularity import select

    whole = _TOKENS.value == "all"
    tasks = [read_examples(path, domain=_DOMAIN.value, documents=_DOCUMENTS.value, whole=whole) for path in _DATA.value]
    model = load(_MODEL.value)
    if tasks and model.tokenizer is None:
        raise UserError(f"--model={_MODEL.value} has no tokenizer.json; put the one it was trained with there.")
    digest = hashlib.sha256(repr(tasks).encode()).hexdigest()[:16] if tasks else ""
    calibration = [
        example_batches(
            examples,
            Tokenizer.from_file(str(model.tokenizer)),
            model.end_of_text_id,
            sequence_length=_SEQUENCE.value,
            batch_size=8,
        )
        for examples in tasks
    ]
    return select(
        model.config,
        model.params,
        calibration,
        method=_METHOD.value,
        keep=_KEEP.value,
        greedy=_GREEDY.value and len(calibration) == 1 and _BUDGET.value != "variable",
        budget=_BUDGET.value,
        mass=_MASS.value,
        seed=_SEED.value,
        data=digest,
    )


if __name__ == "__main__":
    cli.run(main)
