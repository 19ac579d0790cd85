"""Three real processes on loopback: they end together, and each says why."""

import os
import socket
import subprocess
import sys

import pytest

COUNT = 3


def start(what, **environment):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(COUNT), "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.member", what],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | cluster | {"JAX_PROCESS_ID": str(index)} | environment,
        )
        for index in range(COUNT)
    ]


def ends(started):
    """Exit status and output of each."""
    printed = [process.communicate(timeout=100)[0] for process in started]
    return [process.returncode for process in started], printed


def test_a_job_tells_its_names_and_ends_together():
    started = start("end")
    statuses, printed = ends(started)
    assert statuses == [0] * COUNT
    assert f"A job of {COUNT} processes: process 0 (" in printed[0]
    for index, process in enumerate(started):
        assert f"pid {process.pid})" in printed[0]
        assert (
            f"The job ends with process 0 ({os.uname().nodename}, pid {started[0].pid})" in printed[index] or not index
        )
        assert printed[index].rstrip().endswith("ended")


@pytest.mark.parametrize(
    ("what", "status", "text"),
    [("raise", 2, "no paint on this host; buy some."), ("crash", 1, "a bucket leaks")],
)
def test_whoever_fails_ends_all_with_its_status_and_reason(what, status, text):
    started = start(what)
    statuses, printed = ends(started)
    assert statuses == [status] * COUNT
    assert f"Error: {text}" in printed[1]
    assert ("Traceback" in printed[1]) == (what == "crash")
    for other in (printed[0], printed[2]):
        assert f"Error: the job has lost process 1 ({os.uname().nodename}, pid {started[1].pid}): {text}" in other
        assert "Traceback" not in other


def test_a_lost_process_is_named_and_nobody_hangs():
    started = start("sleep")
    for process in started:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
    started[2].kill()
    statuses, printed = ends(started)
    assert statuses == [76, 76, -9]
    for other in printed[:2]:
        assert f"the job has lost process 2 ({os.uname().nodename}, pid {started[2].pid})" in other


def test_what_differs_is_named_with_both_values_and_the_process():
    statuses, printed = ends(start("differ"))
    assert statuses == [2] * COUNT
    for one in printed:
        assert "Error: colour is 'blue' on process 2 (" in one
        assert "and 'red' on process 0 (" in one
        assert "paint it." in one


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"JAX_PROCESS_ID": "3"}, "JAX_PROCESS_ID=3 must lie in 0..2"),
        ({"JAX_NUM_PROCESSES": "three"}, "JAX_NUM_PROCESSES='three' must be a number"),
        ({"JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS='here' must be HOST:PORT"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch, environment, words):
    from emo_jax.errors import UserError
    from emo_jax.parallel import processes

    cluster = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"}
    for name, value in (cluster | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words.replace(".", r"\.")), processes.job():
        pass


def test_no_cluster_and_half_a_description_are_told(monkeypatch):
    from emo_jax.errors import UserError
    from emo_jax.parallel import processes

    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(UserError, match="also needs JAX_COORDINATOR_ADDRESS"), processes.job():
        pass
