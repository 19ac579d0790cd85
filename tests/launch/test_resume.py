"""A training is run again until it has finished, and no longer than makes sense."""

import signal
import subprocess
import time

import pytest

from tests.launch.scripts import LAUNCH, SHELLS, call


@pytest.fixture
def ends(tmp_path, clone, environment):
    """Calls resume.sh with a command that ends with these, one after the other; how it ended and how many it ran."""

    def run(*statuses, shell="sh", **settings):
        program, todo, done = tmp_path / "program", tmp_path / "todo", tmp_path / "done"
        todo.write_text("".join(f"{status}\n" for status in statuses))
        done.write_text("")
        program.write_text(
            f"#!/bin/sh\necho run >>'{done}'\nstatus=$(sed -n 1p '{todo}')\nsed 1d '{todo}' >'{todo}.rest'\n"
            f"cat '{todo}.rest' >'{todo}'\ncase $status in -*) kill \"$status\" $$ ;; *) exit \"$status\" ;; esac\n"
        )
        program.chmod(0o755)
        settings = {"RESUME_PAUSE": "0", **settings}
        ended = call("resume.sh", str(program), clone=clone, environment=environment | settings, shell=shell)
        return ended.returncode, len(done.read_text().splitlines()), ended.stderr

    return run


@pytest.mark.parametrize("shell", SHELLS)
def test_it_goes_on_after_preemptions_and_failures_until_the_training_has_finished(ends, shell):
    assert ends(75, 75, 75, 75, 76, 1, 75, "-SEGV", 0, shell=shell)[:2] == (0, 9)


@pytest.mark.parametrize("status", [0, 2, 126, 127, 130])
def test_it_does_not_go_on_after_an_end_that_would_come_again(ends, status):
    assert ends(75, status, 0)[:2] == (status, 2)


def test_it_gives_up_after_three_quick_failures_in_a_row_and_says_so(ends):
    status, runs, said = ends(1, 76, 75, 1, 139, 76, 0)
    assert (status, runs) == (76, 6)
    assert "Giving up" in said.splitlines()[-1]


def test_failures_that_took_their_time_are_not_counted(ends):
    assert ends(1, 1, 1, 1, 1, 0, RESUME_QUICK="0")[:2] == (0, 6)


def test_a_status_can_be_left_to_the_caller_and_is_kept_in_a_file(ends, tmp_path):
    assert ends(76, 75, 0, RESUME_NOT_ON="75", RESUME_STATUS_FILE=str(tmp_path / "status"))[:2] == (75, 2)
    assert (tmp_path / "status").read_text() == "75\n"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(("told", "wanted"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_lets_the_training_save_and_ends_the_loop(told, wanted, shell, tmp_path, environment):
    program = 'trap "sleep 0.3; echo saved; exit 75" TERM; echo ready; while :; do sleep 0.05; done'
    command = [shell, LAUNCH / "resume.sh", "sh", "-c", program]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(told)
        assert running.stdout.read() == "saved\n"
    assert running.returncode == wanted


def test_a_signal_during_the_pause_ends_it_at_once(environment):
    command = ["sh", LAUNCH / "resume.sh", "sh", "-c", "echo ran; exit 76"]
    environment["RESUME_PAUSE"] = "30"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert "again in 30 s" in running.stderr.readline()
        time.sleep(0.1)
        running.terminate()
        assert running.wait(timeout=5) == 76


@pytest.mark.parametrize(("more", "runs"), [([], 1), (["--resume"], 3)])
def test_one_process_on_this_machine_is_resumed_if_wanted(more, runs, clone, environment, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\necho \"$*\" >>'{tmp_path}/runs'\n[ $(grep -c . '{tmp_path}/runs') -ge 3 ] || exit 75\n"
    )
    python.chmod(0o755)
    environment |= {"EMO_PYTHON": str(python), "RESUME_PAUSE": "0"}
    ended = call("local.sh", "--config=a b", *more, "--workdir=c", clone=clone, environment=environment)
    assert ended.returncode == (0 if more else 75)
    wanted = "-m emo_jax.train --config=a b --workdir=c" + " --preempted_status=75" * bool(more)
    assert (tmp_path / "runs").read_text().splitlines() == [wanted] * runs
