"""From a dense model in a folder to one that is split into emergent experts, and back, a parameter at a time.

A split model keeps what its origin's Hugging Face folder has beside parameters in `source/`, as an imported one does:
so what is merged again can be exported as if it had never been split.
"""

import functools
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from emo_jax.config import Config, DataConfig, PoolConfig
from emo_jax.errors import require_choice
from emo_jax.interop import copy_small_files, read_config, require_new
from emo_jax.interop.huggingface import CONFIG_FILE
from emo_jax.model import ModelConfig
from emo_jax.model.functional import LeafPath, leaf_shapes
from emo_jax.modularity import clustering, emergent
from emo_jax.training.conversion import Progress, is_published, keep_pooler, published_origin, silent
from emo_jax.training.weights import LEFT_OUT, SOURCE, Saving, Stored, end_of_text, published_folder


class _Model(NamedTuple):
    """A model in a folder.

    Attributes:
      config: of it.
      leaves: shape and dtype of each parameter.
      read: a parameter by its path.
      meta: what a saved model keeps beside arrays, of the folder it was imported from.
    """

    config: ModelConfig
    leaves: dict[LeafPath, jax.ShapeDtypeStruct]
    read: Callable[[LeafPath], np.ndarray]
    meta: dict[str, Any]


def split_folder(
    source: Path,
    target: Path,
    *,
    layers: Sequence[int],
    experts: int,
    top_k: int,
    method: str = "kmeans",
    gate: str = "average_key",
    copies: bool = False,
    seed: int = 0,
    firing: Callable[[Sequence[int]], dict[int, clustering.Coactivation]] | None = None,
    log: Callable[[str], None] = print,
    progress: Progress = silent,
) -> None:
    """Writes a dense model with some layers split, as a saved model that a fine-tuning starts from.

    Args:
      source: Hugging Face folder, run directory or saved model.
      target: must not exist, or be empty; it appears when it is complete.
      layers: to split.
      experts, top_k, gate, copies: see `emergent.split_config`.
      method: how neurons are grouped, one of `clustering.METHODS`; unused with copies.
      seed: of the grouping and of a learned gate.
      firing: for method `coactivation`: (layers) → which neurons of each fire together.
      log: told in words what is found.
      progress: told after each parameter.

    Raises:
      UserError: before anything is written: the source cannot be read or split so, or the target holds something.
    """
    source, target = Path(source), Path(target)
    require_choice("--method", method, clustering.METHODS)
    require_new(target)
    model = _read(source)
    config = emergent.split_config(model.config, layers=layers, experts=experts, top_k=top_k, gate=gate, copies=copies)
    orders: emergent.Orders = {}
    if not copies:
        layer_words = ", ".join(map(str, config.split_layers))
        log(f"Grouping the {config.d_dense} neurons of layer {layer_words} ({method}) ...")
        found = firing(config.split_layers) if firing is not None and method == "coactivation" else None
        orders = emergent.neuron_orders(config, model.read, method, seed=seed, firing=found, log=log)
    saving = Saving(target)
    _write(saving, model, model.leaves, functools.partial(emergent.split_leaf, config, orders=orders), progress)
    for path, leaf in emergent.added_leaves(config, orders, seed):
        saving.add(path, leaf)
    _finish(source, saving, config, model.meta)


def merge_folder(source: Path, target: Path, *, progress: Progress = silent) -> None:
    """Writes the dense model that a split one, fine-tuned or not, is made of, as a saved model.

    Args, Raises: as `split_folder`.
    """
    source, target = Path(source), Path(target)
    require_new(target)
    model = _read(source)
    config = emergent.merged_config(model.config)
    orders = {layer: model.read(("layers", f"{layer:02d}", "ffn", "order")) for layer in model.config.split_layers}
    saving, parameters = Saving(target), leaf_shapes(config)
    dense = [path for path in model.leaves if path in parameters]
    _write(saving, model, dense, functools.partial(emergent.merge_leaf, model.config, orders=orders), progress)
    _finish(source, saving, config, model.meta)


def _write(
    saving: Saving,
    model: _Model,
    paths: Collection[LeafPath],
    change: Callable[[LeafPath, np.ndarray], np.ndarray],
    progress: Progress,
) -> None:
    """Parameters of a model, changed, one at a time."""
    total, done = sum(model.leaves[path].size * model.leaves[path].dtype.itemsize for path in paths), 0
    for path in paths:
        leaf = model.read(path)
        done += leaf.nbytes
        saving.add(path, np.ascontiguousarray(change(path, leaf)))
        del leaf
        progress(done, total)


def _read(source: Path) -> _Model:
    if is_published(source):
        origin = published_origin(source, None)
        return _Model(origin.config, origin.leaves, origin.read, {})
    stored = Stored(source)
    kept: dict[str, Any] = {name: stored.meta[name] for name in ("vocabulary_rows", LEFT_OUT) if name in stored.meta}
    return _Model(stored.config.model, stored.abstract_leaves(), stored.read, kept)


def _finish(source: Path, saving: Saving, config: ModelConfig, meta: dict[str, Any]) -> None:
    """Writes what is not arrays, and gives the folder its name."""
    tokenizer = source / "tokenizer.json"
    published = published_folder(source)
    if (source / SOURCE).is_dir():
        shutil.copytree(source / SOURCE, saving.making / SOURCE)
    elif published is not None:
        (saving.making / SOURCE).mkdir()
        shutil.copyfile(published / CONFIG_FILE, saving.making / SOURCE / CONFIG_FILE)
        copy_small_files(published, saving.making / SOURCE)
        if published == source:
            meta = meta | keep_pooler(source, read_config(source), saving.making / SOURCE / LEFT_OUT)
    data = DataConfig(end_of_text=end_of_text(source) if tokenizer.is_file() else "")
    run = Config(model=config, pool=PoolConfig(kind="none"), data=data)
    saving.finish(run, tokenizer if tokenizer.is_file() else None, **meta)
