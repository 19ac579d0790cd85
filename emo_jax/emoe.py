"""Opens up a dense model: `python -m emo_jax.emoe split --model=MODEL --out=DIR --experts=64 --topk=16 --layers=10`.

`split` lays the neurons of some feed-forward layers down as equal experts, of which a token then uses `--topk`: EMoE
(arXiv 2310.10908), which adds no parameter. `--gate=cosine` has a learned gate instead (EMoE-L); `--copies` makes every
expert a whole copy of the layer (GMoE, its baseline). What comes of it is a model that `emo_jax.finetune`, `evaluate`
and the other programs take. `python -m emo_jax.emoe merge --model=RUN --out=DIR` makes it dense again, for any tool.
"""

import time
from pathlib import Path

from absl import flags

from emo_jax import cli
from emo_jax.errors import UserError, require

COMMANDS = ("split", "merge")

_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder, run directory or saved model.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder of the result, to be made.", required=True)
_EXPERTS = flags.DEFINE_integer("experts", 64, "split: experts of a layer (N); must divide its hidden neurons.")
_TOPK = flags.DEFINE_integer("topk", 0, "split: experts that a token uses (k); 0: a quarter of them, as in the paper.")
_LAYERS = flags.DEFINE_string(
    "layers", "last:2", "split: which layers, as in 10,11; START:STOP:STEP as in 16:32:2; last:2; or all."
)
_METHOD = flags.DEFINE_string(
    "method", "kmeans", "split: kmeans (balanced, of first weights), coactivation, contiguous or random."
)
_GATE = flags.DEFINE_string("gate", "average_key", "split: average_key (EMoE) or cosine (learned, EMoE-L).")
_COPIES = flags.DEFINE_bool("copies", False, "split: experts are whole copies of the layer (GMoE).")
_SEED = flags.DEFINE_integer("seed", 0, "split: of the clusters, of --method=random and of a learned gate.")
_DATA = flags.DEFINE_string("data", "", "split: texts for --method=coactivation, as emo_jax.select reads them.")
_DOCUMENTS = flags.DEFINE_integer("documents", 256, "split: use the first so many of --data.")
_SEQUENCE = flags.DEFINE_integer("sequence_length", 512, "split: tokens in a row of --data.")


def main(command: str) -> int:
    """Writes the model, and says what to do with it."""
    start, source, target = time.monotonic(), Path(_MODEL.value), Path(_OUT.value)
    from emo_jax.training.splitting import merge_folder, split_folder

    if command == "merge":
        of_split = ("experts", "topk", "layers", "method", "gate", "copies", "seed", "data", "documents")
        _refuse("that is for split; merge takes --model and --out alone", *of_split, "sequence_length")
        merge_folder(source, target, progress=cli.Bar())
        print(f"\n{target}: dense again, in {time.monotonic() - start:.0f} s")
        print(f"For other tools: python -m emo_jax.convert --from={target} --to_hf=DIR")
        return 0
    gate = _GATE.value
    if _COPIES.value:
        require(
            not flags.FLAGS["gate"].present or gate == "cosine",
            f"--gate={gate} with --copies: copies of one layer have equal keys; drop --gate, for a cosine gate.",
        )
        gate = "cosine"
        _refuse("--copies groups no neurons", "method", "data", "documents", "sequence_length")
    if _METHOD.value != "coactivation":
        _refuse("only --method=coactivation reads texts", "data", "documents", "sequence_length")
    require(_METHOD.value != "coactivation" or bool(_DATA.value), "--method=coactivation needs texts: --data=FILE.")
    top_k = _TOPK.value or max(_EXPERTS.value // 4, 1)
    dense = _model(source)
    split_folder(
        source,
        target,
        layers=layer_list(_LAYERS.value, dense.num_layers),
        experts=_EXPERTS.value,
        top_k=top_k,
        method=_METHOD.value,
        gate=gate,
        copies=_COPIES.value,
        seed=_SEED.value,
        firing=_firing,
        progress=cli.Bar(),
    )
    print(f"\n{target}: {top_k} of {_EXPERTS.value} experts a token, in {time.monotonic() - start:.0f} s")
    classify = "" if dense.causal else " --classify"
    print(f"Fine-tune it: python -m emo_jax.finetune --model={target} --data=task.jsonl{classify} --workdir=DIR")
    return 0


def layer_list(text: str, layers: int) -> tuple[int, ...]:
    """The layers that `--layers` names, of a model with so many.

    Raises:
      UserError: on anything else than numbers, a slice, `last:N` or `all`, or a layer that does not exist.
    """
    try:
        if text == "all":
            chosen = [*range(layers)]
        elif text.startswith("last:"):
            count = int(text.removeprefix("last:"))
            require(1 <= count <= layers, f"--layers={text} asks for {count} layers of a model that has {layers}.")
            chosen = [*range(layers - count, layers)]
        elif ":" in text:
            chosen = [*range(layers)[slice(*(int(part) if part else None for part in text.split(":")))]]
        else:
            chosen = [int(part) for part in text.split(",")]
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--layers={text!r} is neither numbers, as in 10,11, nor START:STOP:STEP, last:N or all."
        ) from None
    for layer in chosen:
        require(0 <= layer < layers, f"--layers={text} names layer {layer}, but the model has layers 0..{layers - 1}.")
    require(bool(chosen), f"--layers={text} names none of the model's layers 0..{layers - 1}.")
    return tuple(sorted(set(chosen)))


def _model(source: Path):
    from emo_jax.interop.huggingface import CONFIG_FILE
    from emo_jax.training.weights import saved_model

    require((source / CONFIG_FILE).is_file(), f"--model={source} has no {CONFIG_FILE}: it holds no model.")
    return saved_model(source)


def _firing(layers):
    """Which neurons of each layer fire together on the texts of --data."""
    from tokenizers import Tokenizer

    from emo_jax.api import load
    from emo_jax.data import example_batches, read_examples
    from emo_jax.modularity.calibration import coactivations

    model = load(_MODEL.value)
    if model.tokenizer is None:
        raise UserError(f"--model={_MODEL.value} has no tokenizer.json; put the one it was trained with there.")
    batches = example_batches(
        read_examples(_DATA.value, documents=_DOCUMENTS.value, whole=True),
        Tokenizer.from_file(str(model.tokenizer)),
        model.end_of_text_id,
        sequence_length=_SEQUENCE.value,
        batch_size=8,
    )
    return coactivations(model.config, model.params, batches, layers)


def _refuse(why: str, *names: str) -> None:
    """Raises `UserError` where a flag was given that would do nothing."""
    for name in names:
        require(not flags.FLAGS[name].present, f"--{name} does nothing here: {why}.")


if __name__ == "__main__":
    cli.run(main, COMMANDS)
