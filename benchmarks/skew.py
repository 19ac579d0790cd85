"""How unevenly domains load the ranks of an expert axis.

`python benchmarks/skew.py --corpus=DIR --out=DIR [--steps=400]` trains emo_tiny and its standard baseline on the
documents of DIR/train.jsonl.gz and routes rows of it as training does, by domain and shuffled.
"""

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def config_file(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def skew(args: argparse.Namespace) -> None:
    import emo_jax
    from emo_jax.data import prepare_store
    from emo_jax.training import train

    print("choices on a group's fullest rank over its mean (median, largest), and groups that need a second round")
    for name in ("emo_tiny", "stdmoe_tiny"):
        run, folder = config_file(name).get_config(), Path(args.out) / name
        run.data.source, run.data.path = "jsonl", str(Path(args.corpus) / "train.jsonl.gz")
        run.data.cache_dir, run.train.steps = str(Path(args.out) / "tokens"), args.steps
        train(run, folder, log=lambda line: None)
        store = prepare_store(run.data, run.model.vocab_size, run.data.cache_dir, lambda line: None)
        counts_BLR = routed_counts(run, emo_jax.load(folder).params, store)
        shuffled = np.random.default_rng(0).permutation(len(counts_BLR))
        for order, rows in (("sorted by domain", counts_BLR), ("shuffled", counts_BLR[shuffled])):
            for ranks in (4, 8):
                loads = rank_loads(rows, ranks, args.rows)
                over = loads.max(-1) / loads.mean(-1)
                second = (over > args.buffer).mean()
                print(f"{name:12} {order:17} {ranks} ranks: {np.median(over):.2f}, {over.max():.2f}; {second:.1%}")


def routed_counts(run, params, store) -> np.ndarray:
    """Choices of each expert in up to 64 rows of each domain, domain after domain, routed as in training: [B, L, R]."""
    import jax

    from emo_jax.data import domain_batches
    from emo_jax.model import bind, draw_pools

    size, documents = 16, run.data.max_documents

    @jax.jit
    def count(params, batch, step):
        draws = None
        if run.pool.kind != "none":
            layers, experts = len(run.model.routed_experts), max(run.model.routed_experts)
            shape = {"rows": size, "layers": layers, "documents": documents, "experts": experts}
            draws = draw_pools(run.pool, run.train.seed, step, **shape)
        model, given = bind(run.model, params), (batch[name] for name in ("tokens", "document_ids", "positions"))
        _, routings = model(*given, pool=run.pool, draws=draws, documents=documents)
        return jax.numpy.stack([routing.totals.counts_BR for routing in routings], axis=1)

    found = []
    for batches in domain_batches(store.train, store.domains, run.data, size).values():
        whole = [batch for batch in batches if (batch["document_ids"] > 0).any(1).all()]
        found += [count(params, batch, np.int32(run.train.steps + i)) for i, batch in enumerate(whole[: 64 // size])]
    return np.concatenate(found)


def rank_loads(counts_BLR: np.ndarray, ranks: int, rows: int) -> np.ndarray:
    """Choices that arrive at each rank of each group of neighbours, with so many rows a rank: [groups, L, ranks]."""
    groups = len(counts_BLR) // (ranks * rows)
    experts = np.pad(counts_BLR, ((0, 0), (0, 0), (0, -counts_BLR.shape[2] % ranks)))
    by_rank = experts.reshape(*experts.shape[:2], ranks, -1).sum(-1)
    return by_rank[: groups * ranks * rows].reshape(groups, ranks * rows, *by_rank.shape[1:]).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=4, help="of a rank, or of its chunk")
    parser.add_argument("--buffer", type=float, default=1.5)
    skew(parser.parse_args())


if __name__ == "__main__":
    main()
