"""Real processes on loopback: the step of several is the step of one."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest


def run(count, mesh):
    """What each of so many processes printed, in order."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [sys.executable, "-m", "tests.training.processes", port, str(count)]
    started = [
        subprocess.Popen([*command, str(index), json.dumps(mesh)], stdout=subprocess.PIPE, text=True)
        for index in range(count)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * count
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.slow
def test_processes_that_share_rows_take_the_step_of_one():
    mesh = {"context": 4}
    (whole,) = run(1, mesh)
    halves = run(2, mesh)
    for half in halves:
        assert half["rows"] == whole["rows"]
        for ours, wanted in zip(
            *(jax.tree.leaves(found["metrics"]) for found in (half, whole)), strict=True
        ):  # sums in another order
            np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)
