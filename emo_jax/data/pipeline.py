"""Batches: an endless training stream that any number of processes sees alike, and the held-out rows once."""

import sys

import grain
import numpy as np

from emo_jax.data.config import DataConfig
from emo_jax.data.packing import pack_rows, row, row_domains
from emo_jax.data.store import Split, TokenStore
from emo_jax.errors import require

_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


class _Rows:
    """Batches of rows by index: rows of a split, -1 for a row of padding."""

    def __init__(self, split: Split, config: DataConfig, fingerprint: str, with_domains: bool = False):
        self._split = split
        self._sequence_length, self._max_documents = config.sequence_length, config.max_documents
        self._starts = pack_rows(split.offsets, config.sequence_length, config.max_documents)
        self._fingerprint = fingerprint
        self._with_domains = with_domains

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __call__(self, rows: list[int]) -> dict[str, np.ndarray]:
        bounds = [(int(self._starts[r]), int(self._starts[r + 1])) if r >= 0 else (0, 0) for r in rows]
        read = [row(self._split, *bound, self._sequence_length) for bound in bounds]
        batch = {name: np.stack([values[name] for values in read]) for name in read[0]}
        if self._with_domains:
            domains = [row_domains(self._split, *bound, self._max_documents) for bound in bounds]
            batch["document_domains"] = np.stack(domains)
        return batch

    def __repr__(self) -> str:
        return f"Rows({self._fingerprint[:16]}, S={self._sequence_length}, G={self._max_documents})"


def train_batches(
    store: TokenStore, config: DataConfig, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """An endless dataset of this process's part of every global batch.

    Global batch k holds rows k·B … k·B + B − 1 of an order that is shuffled anew each epoch, every row once
    an epoch; process p of P reads rows p·B/P … (p+1)·B/P − 1 of it. Element k depends on the store, the
    config and k alone, so a checkpoint (`{"next_index": k}`) fits any number of processes.

    Args:
      store: an open store.
      config: `sequence_length`, `batch_size`, `max_documents` and `shuffle_seed` are read.
      process_index: p.
      process_count: P.

    Returns:
      A dataset of dicts of [B/P, S] arrays: `tokens`, `targets`, `document_ids`, `positions` int32,
      `loss_mask` bool. Its iterator has `get_state`, `set_state` and works with `grain.checkpoint`.

    Raises:
      UserError: if the batch cannot be divided, or there is nothing to train on.
    """
    size = _share(config.batch_size, process_index, process_count, "data.batch_size")
    require(len(store.train) > 0, f"{store.directory} has no training documents; give more text.")
    rows = _Rows(store.train, config, store.fingerprint)
    order = grain.MapDataset.range(len(rows)).seed(config.shuffle_seed).shuffle().repeat()

    def read(k: int) -> dict[str, np.ndarray]:
        first = k * config.batch_size + process_index * size
        return rows([int(order[i]) for i in range(first, first + size)])

    batches = grain.MapDataset.range(sys.maxsize // config.batch_size).map(read)
    return batches.to_iter_dataset(_READ_OPTIONS)


def heldout_batches(
    store: TokenStore, config: DataConfig, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset[dict[str, np.ndarray]]:
    """The held-out documents once, domain after domain.

    Args:
      store: an open store.
      config: `sequence_length` and `max_documents` are read.
      batch_size: rows in a global batch; the last batch is filled up with rows of padding.
      process_index: p.
      process_count: P.

    Returns:
      A finite dataset with a length, to be iterated any number of times, of dicts as in `train_batches`
      plus `document_domains` int32 [B/P, G]: the domain index of document id g at g − 1, 0 behind the last.

    Raises:
      UserError: if the batch cannot be divided, or there are no held-out documents.
    """
    size = _share(batch_size, process_index, process_count, "batch_size")
    require(
        len(store.heldout) > 0,
        f"{store.directory} has no held-out documents; raise data.heldout_fraction or give more text, "
        "and build it anew.",
    )
    rows = _Rows(store.heldout, config, store.fingerprint, with_domains=True)

    def read(k: int) -> dict[str, np.ndarray]:
        first = k * batch_size + process_index * size
        return rows([r if r < len(rows) else -1 for r in range(first, first + size)])

    return grain.MapDataset.range(-(-len(rows) // batch_size)).map(read)


def _share(batch_size: int, process_index: int, process_count: int, field: str) -> int:
    require(
        0 <= process_index < process_count,
        f"process_index={process_index} must lie between 0 and process_count={process_count}, which is excluded.",
    )
    require(
        batch_size % process_count == 0,
        f"{field}={batch_size} must be a multiple of the {process_count} processes.",
    )
    return batch_size // process_count
