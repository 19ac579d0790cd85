"""One step on every mesh of eight simulated devices against one device.

A process of its own, since the other tests see four: `JAX_NUM_CPU_DEVICES=8 python -m tests.training.eight_devices
float64`. Documents are longer than a device's part of a row.
"""

import sys

import jax
import numpy as np

from emo_jax.model import bind, init_parameters
from tests.training import tiny
from tests.training.test_invariance import assert_equal_steps

S = 16
ROWS = ([9, 7], [3, 1, 12], [16], [], [1, 1, 1, 13], [2, 14], [6, 6], [4, 3, 9])
MESHES = [
    {"fsdp": 8},
    {"data": 8},
    {"context": 8},
    {"expert": 8},
    {"expert": 8, "exchange": "all_to_all"},
    {"expert": 4, "fsdp": 2, "exchange": "ring"},
    {"expert": 4, "fsdp": 2, "exchange": "all_to_all", "chunks": 2},
    {"context": 2, "expert": 2, "data": 2},
    {"context": 2, "expert": 2, "data": 2, "exchange": "all_to_all"},
]
ONE_RANK = {"pool": {"min": 2, "max": 2, "forced": 2}}  # every document uses the last two experts and no other
MARGIN = 1e-4


def config(dtype, **sections):
    sections = {"pool": {"min": 2, "max": 12}, "data": {"sequence_length": S}} | sections
    return tiny.config(model={"experts_per_layer": (9, 0, 12), "dtype": dtype}, **sections)


def smallest_margin(run, batch):
    """Between what a router took and left: the logits of a token, and the sums that choose a document's pool."""
    draws = tiny.draws(run)
    model = bind(run.model, init_parameters(run.model, run.train.seed))
    documents = (batch["document_ids"], batch["positions"])
    _, routings = model(batch["tokens"], *documents, pool=run.pool, draws=draws, documents=tiny.G)
    found = []
    for layer, routing in enumerate(routings):
        z_BSR, in_pool_BGR = np.asarray(routing.logits_BSR, np.float64), np.asarray(routing.in_pool_BGR)
        p_BSR = np.exp(z_BSR) / np.exp(z_BSR).sum(-1, keepdims=True)
        for b, ids_S in enumerate(batch["document_ids"]):
            for g in range(1, ids_S.max() + 1):
                pool_R, sums_R = in_pool_BGR[b, g - 1], np.sort(p_BSR[b, ids_S == g].sum(0))[::-1]
                n = min(int(draws.size_BLG[b, layer, g - 1]), len(sums_R))
                found += [sums_R[n - 1] - sums_R[n]] if n < len(sums_R) else []
                z_TR = np.sort(z_BSR[b, ids_S == g][:, pool_R], axis=-1)[:, ::-1]
                c = run.model.num_choices
                found += list(z_TR[:, c - 1] - z_TR[:, c]) if z_TR.shape[1] > c else []
    return min(found)


def main(dtype):
    jax.config.update("jax_enable_x64", dtype == "float64")
    rtol = {"float64": 1e-9, "float32": 2e-5}[dtype]
    run = config(dtype)
    seeds = (seed for seed in range(100) if smallest_margin(run, tiny.batch(seed, ROWS, S)) > MARGIN)
    batch = tiny.batch(next(seeds), ROWS, S)
    cases = [({}, mesh) for mesh in MESHES]
    if dtype == "float64":
        cases += [(ONE_RANK, {"expert": 8}), (ONE_RANK, {"expert": 8, "exchange": "all_to_all"})]
    wanted = {str(fields): tiny.gradients(config(dtype, **fields), batch) for fields in ({}, ONE_RANK)}
    for fields, mesh in cases:
        grads, metrics = tiny.gradients(config(dtype, mesh=mesh, **fields), batch, devices=8)
        exchange = metrics.pop("exchange", None)
        assert (exchange is not None) == ("expert" in mesh)
        if fields:
            assert (exchange["rank_load_max_over_mean"] >= 4).all() and (exchange["rank_rounds"] > 1).all()
        assert_equal_steps((grads, metrics), wanted[str(fields)], rtol)
        print("equal:", dtype, fields, mesh, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
