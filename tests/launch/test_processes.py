"""Several processes on this machine, with a stand-in for Python that does not train."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.launch.scripts import SHELLS

SHOW = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS with $JAX_NUM_CPU_DEVICES: $*"\n'
SAVE = 'trap "sleep 0.2; echo saved $JAX_PROCESS_ID; exit 75" TERM; echo ready; while :; do sleep 0.05; done\n'
WAIT = "while :; do sleep 0.05; done\n"


@pytest.fixture
def start(tmp_path, clone, environment):
    """Starts three processes of a stand-in that does what the shell code says."""

    def run(code, shell="sh", **settings):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\ncase $1 in -c) exec {sys.executable} "$@" ;; esac\n{code}')
        python.chmod(0o755)
        environment.update(EMO_PYTHON=str(python), JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="4", **settings)
        command = [shell, clone / "launch" / "processes.sh", "3", "--config=c", f"--workdir={tmp_path}/run"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return run


def log(tmp_path, index):
    return (tmp_path / "run" / "logs" / f"process-{index}.log").read_text()


@pytest.mark.parametrize("shell", SHELLS)
def test_each_process_knows_its_number_and_has_a_log_and_the_first_shows_on_the_terminal(start, shell, tmp_path):
    running = start(SHOW, shell)
    shown, said = running.communicate(timeout=30)
    assert (running.returncode, said) == (0, "")
    logs = [log(tmp_path, index) for index in range(3)]
    assert shown == logs[0]
    port = logs[0].split(":")[1].split()[0]
    for index, text in enumerate(logs):
        training = f"-m emo_jax.train --distributed --config=c --workdir={tmp_path}/run"
        assert text == f"{index} of 3 at 127.0.0.1:{port} with 4: {training}\n"
    with socket.socket() as free:
        free.bind(("127.0.0.1", int(port)))


@pytest.mark.parametrize("shell", SHELLS)
def test_a_failure_ends_the_others_and_its_status_is_returned(start, shell):
    running = start(f'case $JAX_PROCESS_ID in 1) sleep 0.3; exit 3 ;; esac\ntrap "exit 76" TERM\n{WAIT}', shell)
    _, said = running.communicate(timeout=30)
    assert running.returncode == 3
    assert "process 1 ended with status 3" in said and "process-1.log" in said


def test_a_process_that_will_not_end_is_killed_after_a_while(start):
    running = start(f"case $JAX_PROCESS_ID in 0) sleep 0.3; kill -SEGV $$ ;; esac\ntrap '' TERM\n{WAIT}", EMO_GRACE="1")
    running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGSEGV


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_and_all_may_save(start, told, shell, tmp_path):
    running = start(SAVE, shell)
    assert running.stdout.readline() == "ready\n"
    while len([path for path in tmp_path.glob("run/logs/*.log") if "ready" in path.read_text()]) < 3:
        time.sleep(0.02)
    running.send_signal(told)
    _, said = running.communicate(timeout=30)
    assert (running.returncode, said) == (75, "")
    assert [log(tmp_path, index) for index in range(3)] == [f"ready\nsaved {index}\n" for index in range(3)]


def test_a_second_run_adds_to_the_logs(start, tmp_path):
    for _ in range(2):
        start("echo once\n").communicate(timeout=30)
    assert log(tmp_path, 0) == log(tmp_path, 2) == "once\nonce\n"
