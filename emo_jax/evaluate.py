"""How good is a model, or a subset of it: `python -m emo_jax.evaluate --model=RUN --data=heldout.jsonl.gz`.

Prints loss, next-token accuracy and bits per byte by domain, without document pools; with `--subset=FILE` those of the
kept experts beside the full model's, with `--ablate=FILE` those of all but them. With `--calibration=FILE --keep=16,8`
it chooses a subset for each domain on that file and prints what each size retains and the cross-domain matrix.
"""

import functools
import json
from pathlib import Path

from absl import flags

from emo_jax import cli
from emo_jax.errors import UserError, require, require_choice

_MODEL = flags.DEFINE_string("model", None, "Run directory or Hugging Face folder.", required=True)
_DATA = flags.DEFINE_string("data", None, "Test texts: JSON lines.", required=True)
_SUBSET = flags.DEFINE_string("subset", "", "A subset's file: keep its experts.")
_ABLATE = flags.DEFINE_string("ablate", "", "A subset's file: keep all but its experts.")
_WEIGHTS = flags.DEFINE_string("weights", "renormalized", "Of kept experts: renormalized or original.")
_CALIBRATION = flags.DEFINE_string("calibration", "", "Texts of the same domains to choose subsets on.")
_KEEP = flags.DEFINE_list("keep", [], "Sizes, shared experts included; the cross-domain matrix has the last.")
_METHODS = flags.DEFINE_list("methods", ["router_mass"], "Criteria that choose them.")
_DOCUMENTS = flags.DEFINE_integer("documents", 0, "Use the first so many texts of each domain; 0: all.")
_CALIBRATE = flags.DEFINE_integer("calibration_documents", 25, "The same of the calibration texts.")
_SEQUENCE = flags.DEFINE_integer("sequence_length", 1024, "Tokens in a row.")
_OUT = flags.DEFINE_string("out", "", "Folder for evaluation.json and evaluation.csv.")


def main() -> int:
    """Evaluates and prints tables."""
    require_choice("--weights", _WEIGHTS.value, ("renormalized", "original"))
    require(not (_SUBSET.value and _ABLATE.value), "--subset and --ablate are both given; give one.")
    sizes = ",".join(_KEEP.value)
    require(
        bool(_CALIBRATION.value) == bool(sizes),
        f"--calibration={_CALIBRATION.value!r} and --keep={sizes!r} belong together: texts to choose on, and sizes.",
    )
    require(all(size.isdigit() for size in _KEEP.value), f"--keep={sizes!r} must be numbers, as in 32,16,8.")
    from emo_jax.api import load
    from emo_jax.data import examples_by_domain
    from emo_jax.modularity import Subset, SubsetLosses, measure_retention, tables

    file = _SUBSET.value or _ABLATE.value
    subset = Subset.load(file) if file else None
    model = load(_MODEL.value)
    if model.tokenizer is None:
        raise UserError(f"--model={_MODEL.value} has no tokenizer.json; put the one it was trained with there.")
    read = functools.partial(
        examples_by_domain,
        tokenizer=model.tokenizer,
        end_of_text_id=model.end_of_text_id,
        sequence_length=_SEQUENCE.value,
        batch_size=8,
    )
    test, lengths = read(_DATA.value, documents=_DOCUMENTS.value)
    losses = SubsetLosses(model.config, model.params, test)
    if subset is None:
        made = {"losses": tables.loss_table(losses.full(), lengths)}
    else:
        model.apply_subset(subset)  # refuses another model's
        renormalized = _WEIGHTS.value == "renormalized"
        full, ablate = losses.full(), bool(_ABLATE.value)
        changed = {name: losses.under(subset, name, renormalized=renormalized, ablate=ablate) for name in full}
        table = tables.change_table(full, changed)
        made = {f"{'without' if _ABLATE.value else 'with'} the experts of {file}": table}
    if sizes:
        calibration, _ = read(_CALIBRATION.value, documents=_CALIBRATE.value)
        keeps = [int(size) for size in _KEEP.value]
        result = measure_retention(
            model.config,
            model.params,
            calibration,
            test,
            keeps=keeps,
            matrix_keep=keeps[-1],
            methods=_METHODS.value,
            log=print,
        )
        made["nats added by what is kept"] = tables.retention_table(result)
        made[f"nats added, {keeps[-1]} experts kept"] = tables.matrix_table(result)
    for title, table in made.items():
        print(f"\n{title}\n\n{tables.as_text(table)}")
    if _OUT.value:
        folder = Path(_OUT.value)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(made, indent=1) + "\n")
        (folder / "evaluation.csv").write_text(tables.as_csv(made))
        print(f"\nWritten: {folder / 'evaluation.json'}, {folder / 'evaluation.csv'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
