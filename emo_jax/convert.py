"""Hugging Face folders in and out: `python -m emo_jax.convert --from=FOLDER_OR_REPOSITORY --to=DIR`.

`--to=DIR` makes a Hugging Face folder, or a repository of the hub such as `owner/model`, a saved model that the other
programs read. `--to_hf=DIR` makes a run or saved model a Hugging Face folder that the public loaders read. Either way
one parameter is in memory at a time. `--to` goes on where the same command was interrupted.
"""

import time
from pathlib import Path

from absl import flags

from emo_jax import cli
from emo_jax.errors import require

_FROM = flags.DEFINE_string("from", "", "Hugging Face folder or repository; for --to_hf also a run.")
_TO = flags.DEFINE_string("to", "", "Folder of the saved model, to be made.")
_TO_HF = flags.DEFINE_string("to_hf", "", "Hugging Face folder, to be made.")
_SUBSET = flags.DEFINE_string("subset", "", "File of emo_jax.select: keep these experts alone.")
_VOCAB_ROWS = flags.DEFINE_integer("vocab_rows", 0, "With --to: rows of the vocabulary; 0: as the tokenizer has ids.")
_DTYPE = flags.DEFINE_string("dtype", "", "With --to_hf: float32, bfloat16 or float16; empty: as it is stored.")


def main() -> None:
    """Converts, and says what came of it."""
    require(
        bool(_TO.value) != bool(_TO_HF.value),
        "Give either --to=DIR, to import a Hugging Face folder, or --to_hf=DIR, to write one.",
    )
    require(bool(_FROM.value), "Name what is converted: --from=FOLDER_OR_REPOSITORY, or --from=RUN with --to_hf.")
    require(not (_TO.value and _DTYPE.value), "--dtype goes with --to_hf; --to keeps every tensor as it is stored.")
    require(not (_TO_HF.value and _VOCAB_ROWS.value), "--vocab_rows goes with --to; --to_hf restores the source's.")
    from emo_jax.training.conversion import export_folder, import_folder, source_folder
    from emo_jax.training.weights import saved_model

    start, subset = time.monotonic(), Path(_SUBSET.value) if _SUBSET.value else None
    source, target = source_folder(_FROM.value), Path(_TO.value or _TO_HF.value)
    if _TO.value:
        import_folder(source, target, vocab_rows=_VOCAB_ROWS.value, subset=subset, progress=cli.Bar())
    else:
        export_folder(source, target, subset=subset, dtype=_DTYPE.value, progress=cli.Bar())
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    amount = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
    print(f"\n{target}: {amount} in {time.monotonic() - start:.0f} s")
    model = saved_model(target)
    if model.labels:
        print(f"Try it: emo_jax.load({str(target)!r}).classify(['some text']) in Python.")
    elif not model.causal:
        print(f"Use it: python -m emo_jax.finetune --model={target} --classify --data=task.jsonl --workdir=DIR")
    elif (target / "tokenizer.json").is_file():
        print(f"Try it: python -m emo_jax.generate --model={target} --prompt='Once upon a time'")
    else:
        print(f"Try it: emo_jax.load({str(target)!r}) in Python; there is no tokenizer.json to generate text with.")


if __name__ == "__main__":
    cli.run(main)
