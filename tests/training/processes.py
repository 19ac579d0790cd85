"""One of several processes on one machine: `python -m tests.training.processes PORT COUNT INDEX MESH`.

Prints the metrics of one step of the tiny run, each process having read the rows that its devices hold.
"""

import json
import sys

import jax
import numpy as np

from emo_jax.parallel import own_rows, put_rows
from emo_jax.training.step import init_state, make_train_step, run_mesh
from tests.training import tiny


def main(port: str, count: int, index: int, mesh: dict) -> None:
    jax.config.update("jax_num_cpu_devices", 4 // count)
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
    run = tiny.config(model={"dtype": "float32"}, mesh=mesh)
    spread = run_mesh(run)
    rows = own_rows(spread, run.data.batch_size)
    state, step = init_state(run, spread), make_train_step(run, spread)
    for seed in range(2):
        batch = {name: array[np.array(rows)] for name, array in tiny.batch(seed).items()}
        state, metrics = step(state, put_rows(batch, spread, run.data.batch_size))
    numbers = jax.tree.map(lambda a: np.asarray(a).tolist(), jax.device_get(metrics))
    print(json.dumps({"rows": rows, "metrics": numbers}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
