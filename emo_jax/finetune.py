"""Fine-tunes a model, or a task's experts: `python -m emo_jax.finetune --model=RUN --data=task.jsonl --workdir=DIR`.

The data are JSON lines with `prompt` and `answer` (the answers alone are learnt) or `text`; with `--classify` they have
`text`, maybe `text_pair`, and `label`, and the model becomes a classifier. By default everything is
trained, with the recipe of the paper: one epoch, 32 examples a step, AdamW at 5e-5, a tenth of the steps warm-up, then
linearly to 0, no pools, a balance loss of weight 0.01. `--subset=FILE` trains the model cut to it; with
`--train=subset` only those experts inside the frozen whole model; `--train=new --new_experts=8` only so many fresh
experts a layer. Fields of the run can be set as in `emo_jax.train`: `--config.optimizer.learning_rate=1e-4`, or LoRA
by `--config.optimizer.lora_rank=8`. The same command goes on where it stopped; `emo_jax.merge` puts a cut model back,
`emo_jax.emoe merge` makes one of emergent experts dense.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from absl import flags

from emo_jax import cli
from emo_jax.config import BalanceConfig, Config, DataConfig, ModelConfig, OptimizerConfig, PoolConfig, TrainConfig
from emo_jax.errors import require, require_choice

TRAINED = ("all", "subset", "new")
ROW_UNIT = 128
"""Rows are a multiple of so many tokens, as kernels of attention want them, where `data.sequence_length` is not set."""


def recipe() -> Config:
    """The paper's, as the public code has it; what depends on the model and the data is filled in later."""
    return Config(
        pool=PoolConfig(kind="none"),
        balance=BalanceConfig(weight=0.01, router_z_weight=0.0),
        data=DataConfig(
            source="examples", packing="best_fit", batch_size=32, max_documents=1, max_document_bytes=2**30
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-5, schedule="linear", final_fraction=0.0, beta2=0.999, weight_decay=0.0
        ),
        train=TrainConfig(logits_z_weight=0.0, eval_every=0, guard_window=0),
    )


_CONFIG = cli.define_recipe(recipe())
_MODEL = flags.DEFINE_string("model", None, "Run directory or Hugging Face folder to start from.", required=True)
_DATA = flags.DEFINE_string(
    "data", None, "JSON lines: prompt and answer, or text, or text and label; optional domain.", required=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, which is the fine-tuned model.", required=True)
_SUBSET = flags.DEFINE_string("subset", "", "A subset's file, from emo_jax.select.")
_TRAIN = flags.DEFINE_string("train", "all", "all, subset (its experts, in the frozen model) or new (experts).")
_CLASSIFY = flags.DEFINE_bool("classify", False, "Learn the labels of texts: the model becomes a classifier.")
_NEW = flags.DEFINE_integer("new_experts", 0, "Fresh experts a layer.")
_EPOCHS = flags.DEFINE_float("epochs", 1.0, "How often every example is seen.")
_WARMUP = flags.DEFINE_float("warmup_fraction", 0.1, "Of the steps.")


def main() -> int:
    """Fine-tunes and prints the held-out loss before and after."""
    require_choice("--train", _TRAIN.value, TRAINED)
    require(_EPOCHS.value > 0, f"--epochs={_EPOCHS.value} must be positive.")
    require(0 <= _WARMUP.value < 1, f"--warmup_fraction={_WARMUP.value} must lie in [0, 1).")
    require(
        _TRAIN.value != "subset" or bool(_SUBSET.value),
        "--train=subset needs --subset=FILE, which names the experts to train.",
    )
    require(
        (_TRAIN.value == "new") == (_NEW.value > 0),
        f"--train={_TRAIN.value} with --new_experts={_NEW.value}: fresh experts and --train=new belong together.",
    )
    from emo_jax.modularity import Subset
    from emo_jax.training import train

    require("://" not in _WORKDIR.value, f"--workdir={_WORKDIR.value} must be a folder.")
    run_dir = Path(_WORKDIR.value)
    subset = Subset.load(_SUBSET.value) if _SUBSET.value else None
    config = _configure(_CONFIG.value, subset)
    store = _fill_in_steps(config, run_dir)
    results = run_dir / "finetune.json"
    if results.exists():
        before = json.loads(results.read_text())["before"]
    else:
        before = _heldout(config, store)
        results.write_text(json.dumps({"before": before}, indent=1) + "\n")
    if subset is not None:
        (run_dir / "subset.json").write_text(subset.to_json())
    result = train(config, run_dir)
    if result.stopped_by or result.heldout is None:
        print(f"Stopped after step {result.step}. The same command goes on from there.")
        return result.exit_status
    after = result.heldout.to_json()
    results.write_text(json.dumps({"before": before, "after": after}, indent=1) + "\n")
    _print_losses(before, after, bool(config.model.labels))
    print(f"\nModel and report: {run_dir}")
    return 0


def _configure(config: Config, subset: Any) -> Config:
    """The recipe for this model: its geometry, what is cut, added and trained."""
    from emo_jax.training.start import changed_model, origin_model
    from emo_jax.training.weights import end_of_text, saved_fingerprint

    folder = Path(_MODEL.value)
    whole = origin_model(folder)
    require(
        not whole.split_layers or (subset is None and _TRAIN.value == "all"),
        f"--train={_TRAIN.value} with --subset={_SUBSET.value!r}: emergent experts (model.split_layers) are trained "
        "together; drop both.",
    )
    experts: tuple[str, ...] = ()
    if subset is not None:
        subset.check(whole, saved_fingerprint(folder))
        experts = tuple(" ".join(map(str, layer)) for layer in subset.experts)
    kept = () if _TRAIN.value == "subset" else experts
    changed = changed_model(whole, kept, _NEW.value)
    trained = experts if _TRAIN.value == "subset" else ()
    if _NEW.value:
        trained = tuple(" ".join(map(str, range(routed - _NEW.value, routed))) for routed in changed.routed_experts)
    made = dataclasses.replace(config, model=_with_labels(changed))
    made.data = dataclasses.replace(
        config.data, path=_DATA.value, end_of_text=end_of_text(folder), labels=made.model.labels
    )
    if made.model.labels:
        made.data = dataclasses.replace(made.data, **made.model.label_fields)
    if changed.max_positions and "config.data.sequence_length" not in flags.FLAGS:
        made.data.sequence_length = min(made.data.sequence_length, changed.max_positions)
    made.optimizer = dataclasses.replace(config.optimizer, trainable_experts=trained)
    made.train = dataclasses.replace(config.train, init_from=_MODEL.value, keep_experts=kept, new_experts=_NEW.value)
    made.validate()  # before tokens are made; the number of steps follows from them
    return made


def _with_labels(model: ModelConfig) -> ModelConfig:
    """The model as a classifier of the data's labels, where it is to be one."""
    from emo_jax.data import has_labels, label_names

    require(
        model.causal or bool(model.labels) or _CLASSIFY.value,
        f"--model={_MODEL.value} is an encoder, which cannot be trained to write; give it labels (--classify).",
    )
    if not model.labels and not _CLASSIFY.value and has_labels(_DATA.value):
        print(f"{_DATA.value} has labels, which are not learnt; give --classify to learn them, and not the texts.")
    if model.labels or not _CLASSIFY.value:
        return model
    return dataclasses.replace(model, labels=label_names(_DATA.value))


def _fill_in_steps(config: Config, run_dir: Path) -> Any:
    """Tokenizes the examples, and sets the length of rows and of the run in steps; returns the store."""
    from emo_jax.data import count_train_rows, prepare_store

    config.data.validate()
    data = dataclasses.replace(config.data, tokenizer=config.tokenizer())
    store = prepare_store(data, config.model.vocab_size, config.data.cache_dir or run_dir / "data", print)
    if data.source == "examples" and data.max_documents == 1 and "config.data.sequence_length" not in flags.FLAGS:
        unit = ROW_UNIT * max(config.mesh.context, 1)
        data.sequence_length = min(data.sequence_length, -(-store.longest // unit) * unit)
        config.data.sequence_length = data.sequence_length
    config.train.steps = math.ceil(_EPOCHS.value * count_train_rows(store, data) / data.batch_size)
    config.optimizer.warmup_steps = int(_WARMUP.value * config.train.steps)
    config.train.checkpoint_every = min(config.train.checkpoint_every, config.train.steps)
    return store


def _heldout(config: Config, store: Any) -> Any:
    """Held-out losses of the model that the run starts from, as JSON."""
    from emo_jax.data import heldout_batches
    from emo_jax.evaluation import make_heldout_loss
    from emo_jax.training.start import check_origin, initial_parameters
    from emo_jax.training.step import run_mesh, state_shardings

    config.validate()
    check_origin(config)
    rows = config.data.batch_size // config.train.microbatches
    mesh = run_mesh(config)
    params = initial_parameters(config, state_shardings(config, mesh).params)
    loss = make_heldout_loss(config.model, mesh, store.domains, config.mesh)
    return loss(params, heldout_batches(store, config.data, rows)).to_json()


def _print_losses(before: Any, after: Any, classifier: bool) -> None:
    shown = ("accuracy", "loss") if classifier else ("loss",)
    counted = "texts" if classifier else "tokens"
    for value in shown:
        words = f"loss (nats a {'label' if classifier else 'token of the answers'})" if value == "loss" else value
        print(f"\nHeld-out {words}, before and after:")
        lines = [(name, before["domains"][name], after["domains"][name]) for name in sorted(after["domains"])]
        lines += [("all", before, after)]
        width = max(len(name) for name, _, _ in lines)
        for name, old, new in lines:
            print(f"  {name:<{width}}  {old[value]:.3f}  {new[value]:.3f}  ({new['tokens']:,} {counted})")


if __name__ == "__main__":
    cli.run(main)
