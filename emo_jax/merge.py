"""Puts a fine-tuned subset back into the model it was cut from: `python -m emo_jax.merge --tuned=DIR --out=DIR`.

`--tuned` is the folder of `emo_jax.finetune --subset=FILE`. Experts outside the subset stay as they were. With `--data`
it also prints what each domain gained or forgot.
"""

from pathlib import Path

from absl import flags

from emo_jax import cli
from emo_jax.errors import require

_TUNED = flags.DEFINE_string("tuned", None, "Run directory of the fine-tuned subset.", required=True)
_MODEL = flags.DEFINE_string("model", "", "The model it was cut from, where that has moved.")
_OUT = flags.DEFINE_string("out", None, "Folder of the merged model, to be made.", required=True)
_WEIGHT = flags.DEFINE_float("weight", 1.0, "1 replaces the experts; less interpolates between old (0) and new.")
_ROUTERS = flags.DEFINE_bool("routers", True, "Put their router columns back too.")
_SHARED = flags.DEFINE_bool("shared", True, "Put the shared experts back too.")
_REST = flags.DEFINE_bool("rest", False, "Put everything else back too: attention, norms, embedding, head.")
_DATA = flags.DEFINE_string("data", "", "Test texts with domains, JSON lines, for the forgetting report.")
_DOCUMENTS = flags.DEFINE_integer("documents", 0, "Use the first so many texts of each domain; 0: all.")
_SEQUENCE = flags.DEFINE_integer("sequence_length", 1024, "Tokens in a row.")


def main() -> int:
    """Writes the merged model and prints the report."""
    from emo_jax.api import Model, load
    from emo_jax.config import Config
    from emo_jax.modularity import Subset, SubsetLosses, merge_back, tables
    from emo_jax.modularity.evaluation import Texts

    tuned_dir, out = Path(_TUNED.value), Path(_OUT.value)
    file = tuned_dir / "subset.json"
    require(
        file.is_file(),
        f"--tuned={tuned_dir} has no subset.json: only what emo_jax.finetune --subset=FILE made can be merged.",
    )
    require(not out.exists() or not any(out.iterdir()), f"--out={out} holds something already; give another folder.")
    run = Config.from_json((tuned_dir / "config.json").read_text())
    require(
        bool(run.train.keep_experts),
        f"--tuned={tuned_dir} holds a whole model (emo_jax.finetune --train=subset): there is nothing to merge.",
    )
    origin = _MODEL.value or run.train.init_from
    require(Path(origin).is_dir(), f"{tuned_dir} was cut from {origin!r}, which is not there; name it with --model.")
    subset, tuned, model = Subset.load(file), load(tuned_dir), load(origin)
    subset.check(model.config, model.fingerprint)
    params = merge_back(
        model.params,
        subset,
        tuned.params,
        weight=_WEIGHT.value,
        routers=_ROUTERS.value,
        shared=_SHARED.value,
        rest=_REST.value,
    )
    merged = Model(model.config, params, model.tokenizer, model.end_of_text_id)
    if _DATA.value:
        texts = Texts(model, Path(origin), data=_DATA.value, sequence_length=_SEQUENCE.value)
        test, _ = texts.test(_DOCUMENTS.value)
        before, after = (SubsetLosses(m.config, m.params, test).full() for m in (model, merged))
        print(f"\nNats a token before and after the merge\n\n{tables.as_text(tables.change_table(before, after))}")
    merged.save(out)
    print(f"\nMerged model: {out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
