"""What a sharded step takes, and how unevenly domains load the ranks of its experts.

`python benchmarks/sharding.py compile --topology=v5p:4x4x4 --fsdp=8 --expert=8 --chunks=4 [--layers=16]` compiles
configs/emo_1b14b.py (4 rows of 4096 a chip, full remat) for real TPUs without one, and reads from the program what a
chip holds, multiplies and sends. All 16 layers take about an hour of one core.

`python benchmarks/sharding.py skew --corpus=DIR --out=DIR [--steps=400]` trains emo_tiny and its standard baseline on
the documents of DIR/train.jsonl.gz and routes rows of it as training does, by domain and shuffled.
"""

import argparse
import collections
import dataclasses
import importlib.util
import os
import time
from pathlib import Path
from types import ModuleType

import numpy as np

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def config_file(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected_flops(model, tokens: int, buffer: float) -> tuple[float, float]:
    """Of a chip's dense and grouped products: the model's, forward and backward, and what full remat computes again.

    Again are all products of a layer whose results another's gradient needs: not the last of a feed-forward.
    """
    d, f, layers = model.d_model, model.d_expert, model.num_layers
    attention = 2 * d * (model.num_heads + model.kv_heads) * model.head_dim
    shared, routed = model.num_shared_experts * d * f, model.num_choices * d * f
    router = d * (model.num_experts - model.num_shared_experts)
    dense = layers * (8 * attention + (18 + 4) * shared + 8 * router) + 6 * d * model.vocab_size
    return tokens * dense, tokens * layers * (18 + 4) * routed * buffer


def compile_step(args: argparse.Namespace) -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies

    from emo_jax.config import MeshConfig
    from emo_jax.parallel.compiled import collectives, products
    from emo_jax.training.step import abstract_batch, abstract_state, make_train_step, run_mesh

    run = config_file("emo_1b14b").get_config()
    run.model = dataclasses.replace(run.model, num_layers=args.layers, remat=args.remat)
    run.mesh = MeshConfig(args.data, args.fsdp, args.expert, args.context, args.exchange, args.buffer, args.chunks)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    run.data.path, run.data.batch_size, run.train.microbatches = "unused", args.rows * len(devices), 1
    run.validate()
    mesh = run_mesh(run, devices)
    start = time.time()
    compiled = make_train_step(run, mesh).lower(abstract_state(run, mesh), abstract_batch(run, mesh)).compile()
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    if args.hlo:
        Path(args.hlo).write_text(hlo)
    held, temporary = memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9
    print(f"{args.topology}, {args.layers} layers, {dict(mesh.shape)}, {time.time() - start:.0f} s")
    print(f"arguments {held:.2f} GB + temporaries {temporary:.2f} GB = {held + temporary:.2f} GB a chip")
    found = products(hlo)
    dense, grouped = expected_flops(
        run.model, args.rows * run.data.sequence_length, args.buffer if args.expert > 1 else 1
    )
    print(f"dense products {found.dense:.4e} FLOPs, {found.dense / dense:.4f} of the model's and the recomputed ones'")
    print(f"grouped products {found.grouped:.4e} FLOPs, {found.grouped / grouped:.4f}, buffers counted full")
    sent, runs = collections.Counter(), collections.Counter()
    for one in collectives(hlo, mesh):
        key = (one.kind, " × ".join(one.axes), "" if one.times else "in a further round")
        sent[key] += one.sent * max(one.times, 1)
        runs[key] += max(one.times, 1)
    for key, total in sent.most_common():
        print(f"{total / 1e6:10.1f} MB in {runs[key]:3} × {key[0]} over {key[1]} {key[2]}".rstrip())


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
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("compile")
    one.add_argument("--topology", default="v5p:4x4x4")
    for name, value in (
        ("data", 1),
        ("fsdp", 8),
        ("expert", 8),
        ("context", 1),
        ("chunks", 4),
        ("layers", 16),
        ("rows", 4),
    ):
        one.add_argument(f"--{name}", type=int, default=value)
    one.add_argument("--exchange", default="auto")
    one.add_argument("--buffer", type=float, default=1.5)
    one.add_argument("--remat", default="full")
    one.add_argument("--hlo", default="", help="file to write the compiled program to")
    one.set_defaults(run=compile_step)
    two = commands.add_parser("skew")
    two.add_argument("--corpus", required=True)
    two.add_argument("--out", required=True)
    two.add_argument("--steps", type=int, default=400)
    two.add_argument("--rows", type=int, default=4, help="of a rank, or of its chunk")
    two.add_argument("--buffer", type=float, default=1.5)
    two.set_defaults(run=skew)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
