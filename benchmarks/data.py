"""Tokens a second into a store and out of it, on the text of this machine: `python benchmarks/data.py`.

Everything is one process; tokenizing uses all of its cores, reading rows the pipeline's own threads.
"""

import itertools
import tempfile
import time

from _timing import versions

from emo_jax.data import DataConfig, build_store, encode, pack_rows, padding_share, train_batches

VOCAB_SIZE = 4096
SEQUENCE_LENGTHS = (1024, 4096)
SETTINGS = (("concatenate", 0), ("best_fit", 0), ("concatenate", 32))  # packing, repetition filter
BATCH_TOKENS = 32 * 1024
BATCHES = 300
ENCODED_BYTES = 8_000_000


def main() -> None:
    """Prints a line a stage, then one a shape and packing."""
    print(versions())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = build_store(DataConfig(), VOCAB_SIZE, f"{folder}/store")
        seconds = time.perf_counter() - start
        tokens = len(store.train.tokens) + len(store.heldout.tokens)
        print(f"store: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s with a tokenizer trained")

        tokenizer, offsets = store.tokenizer(), store.train.offsets
        bounds = itertools.takewhile(lambda bound: bound[1] < ENCODED_BYTES / 3, itertools.pairwise(offsets.tolist()))
        texts = [tokenizer.decode(store.train.tokens[a:b].tolist()) for a, b in bounds]
        start = time.perf_counter()
        tokens = sum(map(len, encode(tokenizer, texts)))
        print(f"tokenizing alone: {tokens / (time.perf_counter() - start):,.0f} tokens/s")

        print(
            f"{'S':>5} {'B':>3}  {'packing':<12} {'filter':>6} {'packing took':>12} {'padding':>8} {'filtered':>8} "
            f"{'rows/s':>8} {'tokens/s':>12}"
        )
        for sequence_length, (packing, times) in itertools.product(SEQUENCE_LENGTHS, SETTINGS):
            config = DataConfig(
                sequence_length=sequence_length,
                batch_size=BATCH_TOKENS // sequence_length,
                packing=packing,
                max_repetitions=times,
            )
            start = time.perf_counter()
            rows = pack_rows(offsets, sequence_length, config.max_documents, packing)
            milliseconds = 1e3 * (time.perf_counter() - start)
            share = padding_share(rows, sequence_length)
            batches = iter(train_batches(store, config))
            next(batches)
            start = time.perf_counter()
            filtered = sum(
                int((~batch["document_ids"].any(axis=1)).sum()) for batch in itertools.islice(batches, BATCHES)
            )
            read = BATCHES * config.batch_size
            rate = read / (time.perf_counter() - start)
            print(
                f"{sequence_length:>5} {config.batch_size:>3}  {packing:<12} {times:>6} {milliseconds:>9.1f} ms "
                f"{share:>8.3%} {filtered / read:>8.2%} {rate:>8,.0f} {rate * sequence_length:>12,.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
