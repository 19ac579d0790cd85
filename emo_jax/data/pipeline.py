"""Batches: an endless training stream that any number of processes sees alike, and the held-out rows once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from emo_jax.data.config import DataConfig
from emo_jax.data.packing import Rows, pack_rows, padding_share, row, row_domains
from emo_jax.data.prepared import ShardRows, Shards, open_rows
from emo_jax.data.store import Log, Split, TokenStore, silent
from emo_jax.errors import require

_PADDING = np.zeros((0, 2), np.int64)

if TYPE_CHECKING:
    import grain


class _SplitRows:
    """The rows of one split, as `ShardRows` has those of many."""

    def __init__(self, split: Split, rows: Rows):
        self._split, self._rows = split, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, r: int) -> tuple[Split, np.ndarray]:
        return self._split, self._rows[r] if r >= 0 else _PADDING


class _Batches:
    """Batches of rows by index, -1 (of a split's) for a row of padding."""

    def __init__(
        self, rows: _SplitRows | ShardRows, config: DataConfig, max_repetitions: int = 0, with_domains: bool = False
    ):
        self.rows = rows
        self._sequence_length, self._max_documents = config.sequence_length, config.max_documents
        self._max_repetitions, self._label_at = max_repetitions, config.label_at
        self._with_domains = with_domains

    def __call__(self, indices: list[int]) -> dict[str, np.ndarray]:
        found = [self.rows[r] for r in indices]
        shape = self._sequence_length, self._max_repetitions, self._label_at
        read = [row(split, spans, *shape) for split, spans in found]
        batch = {name: np.stack([values[name] for values in read]) for name in read[0]}
        if self._with_domains:
            domains = [row_domains(split, spans, self._max_documents) for split, spans in found]
            batch["document_domains"] = np.stack(domains)
        return batch


def train_batches(
    store: TokenStore, config: DataConfig, places: Sequence[int] | None = None, log: Log = silent
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """An endless dataset of this process's part of every global batch.

    Global batch k holds rows k·B … k·B + B − 1 of an order that is shuffled anew each epoch, every row once
    an epoch; a process reads those that its devices hold (`parallel.own_rows`). Element k depends on the store, the
    config, k and the places alone, so a checkpoint (`{"next_index": k}`) fits any number of processes. In a mixture
    each part has such an order of its own, and rows are taken from them in turn, in the proportions of the weights.

    Args:
      store: an open store.
      config: `sequence_length`, `batch_size`, `max_documents`, `packing`, `max_repetitions`, `shuffle_seed`,
        `label_at` and the weights of `mixture` are read.
      places: of the rows to read in a global batch, 0 … B − 1; None: all.
      log: receives a line on the rows.

    Returns:
      A dataset of dicts of [places, S] arrays: `tokens`, `targets`, `document_ids`, `positions` int32,
      `loss_mask` bool, and `token_types` int32 if the store has types; a row that the repetition filter took out has
      document ids of 0 only. Its iterator has `get_state`, `set_state` and works with `grain.checkpoint`.

    Raises:
      UserError: if there is nothing to train on.
    """
    import grain  # brings JAX along, which nobody who writes tokens needs

    places = range(config.batch_size) if places is None else places
    require(len(store.train) > 0, f"{store.directory} has no training documents; give more text.")
    parts, rows, padding = _train_rows(store, config)
    batch = _Batches(rows, config, config.max_repetitions)
    log(f"Rows: {len(rows)} of {config.sequence_length} tokens, {config.packing}, {padding:.1%} padding.")
    orders = [
        grain.MapDataset.range(start, stop).seed(config.shuffle_seed).shuffle().repeat() for _, start, stop in parts
    ]
    order = orders[0]
    if len(orders) > 1:
        weights = [part.weight for part in config.parts()]
        order = grain.MapDataset.mix(orders, weights)  # which part comes next is a function of the place alone
        for (name, start, stop), weight in zip(parts, weights, strict=True):
            log(f"  {name}: {stop - start} rows, {weight / sum(weights):.1%} of a batch.")

    def read(k: int) -> dict[str, np.ndarray]:
        return batch([int(order[k * config.batch_size + place]) for place in places])

    batches = grain.MapDataset.range(sys.maxsize // config.batch_size).map(read)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))


def heldout_batches(
    store: TokenStore, config: DataConfig, batch_size: int, places: Sequence[int] | None = None
) -> grain.MapDataset[dict[str, np.ndarray]]:
    """The held-out documents once.

    They are packed as in training, because where documents are cut decides how much context a token has, and
    complete, because the repetition filter only chooses what to learn from.

    Args:
      store: an open store.
      config: `sequence_length`, `max_documents`, `packing` and `label_at` are read.
      batch_size: rows in a global batch; the last batch is filled up with rows of padding.
      places: of the rows to read in a global batch; None: all.

    Returns:
      A finite dataset with a length, to be iterated any number of times, of dicts as in `train_batches`
      plus `document_domains` int32 [places, G]: the domain index of document id g at g − 1, 0 behind the last.

    Raises:
      UserError: if there are no held-out documents.
    """
    import grain

    places = range(batch_size) if places is None else places
    require(
        len(store.heldout) > 0,
        f"{store.directory} has no held-out documents; raise data.heldout_fraction or give more text, "
        "and build it anew.",
    )
    rows = _pack_part(store.heldout, 0, len(store.heldout), config)
    batch = _Batches(_SplitRows(store.heldout, rows), config, with_domains=True)
    count = len(batch.rows)

    def read(k: int) -> dict[str, np.ndarray]:
        rows = (k * batch_size + place for place in places)
        return batch([r if r < count else -1 for r in rows])

    return grain.MapDataset.range(-(-count // batch_size)).map(read)


def domain_batches(
    split: Split, domains: Sequence[str], config: DataConfig, batch_size: int, documents: int = 0
) -> dict[str, list[dict[str, np.ndarray]]]:
    """The documents of each domain in batches of their own.

    Args:
      split: documents, domain after domain, such as a store's held-out ones.
      domains: names, in the order of the split's indices.
      config: `sequence_length`, `max_documents`, `packing` and `label_at` are read.
      batch_size: rows of a batch; the last of a domain is filled up with rows of padding.
      documents: most documents of a domain; 0: all.

    Returns:
      For each domain that has documents its batches, as in `heldout_batches`.
    """
    batches = {}
    for index, name in enumerate(domains):
        start, stop = np.searchsorted(split.domains, [index, index + 1]).tolist()
        if start == stop:
            continue
        rows = _pack_part(split, start, min(stop, start + documents) if documents else stop, config)
        batch = _Batches(_SplitRows(split, rows), config, with_domains=True)
        firsts = range(0, len(rows), batch_size)
        batches[name] = [batch([r if r < len(rows) else -1 for r in range(i, i + batch_size)]) for i in firsts]
    return batches


def first_documents(split: Split | Shards, domains: Sequence[str], documents: int = 0) -> Split:
    """The first so many documents of each domain (0: all), domain after domain, in memory."""
    if isinstance(split, Shards):
        return split.first_documents(len(domains), documents)
    order = np.argsort(split.domains, kind="stable")
    starts = np.searchsorted(split.domains[order], np.arange(len(domains)))
    place = np.arange(len(order)) - starts[split.domains[order]]
    chosen = order[place < documents] if documents else order
    spans = [
        split.tokens[start:stop] for start, stop in zip(split.offsets[chosen], split.offsets[chosen + 1], strict=True)
    ]
    tokens = np.concatenate(spans) if spans else np.zeros(0, split.tokens.dtype)
    offsets = np.cumsum([0, *map(len, spans)])
    answers = None if split.answers is None else split.answers[chosen]
    labels = None if split.labels is None else split.labels[chosen]
    return Split(tokens, offsets, split.domains[chosen], answers, labels)


def count_train_rows(store: TokenStore, config: DataConfig) -> int:
    """How many rows an epoch of `train_batches` has."""
    return len(_train_rows(store, config)[1])


def _train_rows(
    store: TokenStore, config: DataConfig
) -> tuple[list[tuple[str, int, int]], _SplitRows | ShardRows, float]:
    """Name, first row and the one behind the last of each part; all rows; and their share of padding."""
    train = store.train
    if isinstance(train, Shards):
        found = open_rows(train, store.directory, config)
        return found.parts, found, 1 - len(train.tokens) / (len(found) * config.sequence_length)
    packed = [_pack_part(train, start, stop, config) for _, start, stop in store.parts]
    rows = Rows.join(packed)
    ends = np.cumsum([len(part) for part in packed]).tolist()
    parts = [(name, end - len(part), end) for (name, _, _), part, end in zip(store.parts, packed, ends, strict=True)]
    return parts, _SplitRows(train, rows), padding_share(rows, config.sequence_length)


def _pack_part(split: Split, start: int, stop: int, config: DataConfig) -> Rows:
    """The rows of documents start … stop − 1: they share none with other parts.

    Raises:
      UserError: where a text with a label would be cut.
    """
    offsets = split.offsets[start : stop + 1]
    if split.labels is not None:
        longest = int(np.diff(offsets).max(initial=0))
        require(
            config.packing == "best_fit" and config.sequence_length >= longest,
            f"data.packing={config.packing!r} with data.sequence_length={config.sequence_length} would cut texts with "
            f"labels, of up to {longest} tokens: set data.packing='best_fit' and data.sequence_length to {longest} or "
            "more.",
        )
    rows = pack_rows(offsets - offsets[0], config.sequence_length, config.max_documents, config.packing)
    return Rows(rows.spans + offsets[0], rows.offsets)
