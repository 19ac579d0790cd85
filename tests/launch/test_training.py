"""`launch/processes.sh` as its user runs it: killed, preempted and continued on other numbers of processes."""

import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from tests.test_train import ROOT, command, corpus, environment, lines, metrics, wait_for_step  # noqa: F401

FIELDS = {"mesh.fsdp": 2, "mesh.expert": 2, "model.dtype": "float32"}


def start(count, workdir, corpus, **overrides):  # noqa: F811
    options = command(workdir, corpus, **FIELDS, **overrides)[3:]
    script = ["sh", str(ROOT / "launch" / "processes.sh"), str(count), *options, "--preempted_status=75"]
    variables = {"JAX_NUM_CPU_DEVICES": str(4 // count), "EMO_PYTHON": sys.executable, "EMO_GRACE": "5"}
    return subprocess.Popen(script, env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def member(script, index):
    """The pid of a process of the job."""
    children = psutil.Process(script.pid).children()
    return next(child.pid for child in children if child.environ().get("JAX_PROCESS_ID") == str(index))


def test_killed_and_preempted_it_goes_on_with_other_processes_as_if_undisturbed(corpus, tmp_path):  # noqa: F811
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    alone = environment() | {"JAX_NUM_CPU_DEVICES": "4"}
    assert subprocess.run(command(whole, corpus, **FIELDS), env=alone, capture_output=True, timeout=300).returncode == 0

    four = start(4, workdir, corpus, **{"train.steps": 60})
    wait_for_step(workdir, 10)
    os.kill(member(four, 2), signal.SIGKILL)
    printed, _ = four.communicate(timeout=120)
    assert four.returncode == 137
    assert b"process 2 ended with status 137" in printed
    assert b"A job of 4 processes" in printed

    two = start(2, workdir, corpus)
    wait_for_step(workdir, 40)
    os.kill(member(two, 1), signal.SIGTERM)  # one is told, both save and end
    printed, _ = two.communicate(timeout=120)
    assert two.returncode == 75, printed
    stopped = len(lines(workdir))
    assert f"Stopped after step {stopped}. The same command goes on from there.".encode() in printed
    assert stopped < 60
    assert (workdir / "checkpoints" / str(stopped)).is_dir()

    last = subprocess.run(command(workdir, corpus, **FIELDS), env=alone, capture_output=True, text=True, timeout=300)
    assert last.returncode == 0, last.stderr
    assert f"Continuing from the checkpoint of step {stopped}." in last.stdout
    ours, wanted = metrics(workdir), metrics(whole)
    assert [line["step"] for line in ours] == list(range(1, 61))
    for name in ("loss", "cross_entropy", "grad_norm"):  # sums in another order
        values = [[line[name] for line in log] for log in (ours, wanted)]
        np.testing.assert_allclose(*values, rtol=2e-4, atol=2e-5)
    assert ours[-1]["heldout"]["loss"] == pytest.approx(wanted[-1]["heldout"]["loss"], rel=1e-5)
    ours, wanted = (log[-1]["heldout"].get("structure") for log in (ours, wanted))
    for use, other in zip(ours["use"], wanted["use"], strict=True):  # of the documents of all processes
        np.testing.assert_allclose(use, other, atol=0.05)
