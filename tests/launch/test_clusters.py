"""The scripts for pods and clusters at work, with stand-ins for gcloud, Slurm and kubectl that note their calls."""

import shutil

import pytest

from tests.launch.scripts import RUN, WAYS, call

WATCH = [*WAYS["tpu_pod.sh"], *RUN]

# Answers for the slice and its hosts from one line a minute; a minute ends with a sleep.
GCLOUD = """
case "$*" in
    *describe*) sed -n "$(minute)p" "$HOME/slice" ;;
    *" state;"*) sed -n "$(minute)p" "$HOME/hosts" | tr , '\\n' ;;
    *create*) exit "${CREATE:-0}" ;;
esac
"""


@pytest.fixture
def program(tmp_path, environment):
    """Puts a shell script where programs are found; `$calls` is the file with one line for each call."""

    def put(name, code):
        path = tmp_path / "home" / "tools" / name
        path.unlink(missing_ok=True)
        path.write_text(f'#!/bin/sh\ncalls=\'{tmp_path}/calls\'\necho "{name} $*" >>"$calls"\n{code}\n')
        path.chmod(0o755)

    for tool in ("sort", "uniq"):
        (tmp_path / "home" / "tools" / tool).symlink_to(shutil.which(tool))
    put("git", "")
    return put


@pytest.fixture
def calls(tmp_path):
    return lambda: (tmp_path / "calls").read_text().splitlines()


@pytest.fixture
def watch(program, clone, environment, calls):
    """Watches a pod whose minutes, states of the slice and then of its hosts, are given; what was done in each."""

    def run(*minutes):
        program("gcloud", GCLOUD)
        program("minute", 'grep -c "^sleep" "$calls" | { read -r past; echo $((past + 1)); }')
        program("sleep", "")
        home = clone.parent / "home"
        (home / "slice").write_text("".join(f"{slice}\n" for slice, _ in minutes))
        (home / "hosts").write_text("".join(f"{hosts}\n" for _, hosts in minutes))
        ended = call("tpu_pod.sh", *WATCH, clone=clone, environment=environment)
        done = [[]]
        for line in calls():
            if line.startswith("sleep"):
                done.append([])
            for word in ("create", "delete", "setup", "start"):
                if f" {word} " in line:
                    done[-1].append(word)
        return ended, done

    return run


def test_a_pod_is_asked_for_again_when_it_was_taken_away_and_deleted_when_the_training_has_finished(watch):
    ended, done = watch(
        ("", ""),
        ("PROVISIONING", ""),
        ("ACTIVE", "stopped,stopped"),
        ("ACTIVE", "running,running"),
        ("SUSPENDING", ""),
        ("SUSPENDED", ""),
        ("", ""),
        ("ACTIVE", "stopped,stopped"),
        ("ACTIVE", "running,stopped"),  # a host has started anew
        ("ACTIVE", ""),  # ssh does not answer
        ("ACTIVE", "ended 0,running"),
        ("ACTIVE", "ended 0,ended 0"),
    )
    assert ended.returncode == 0, ended.stderr
    start = ["setup", "start"]
    assert done == [["create"], [], start, [], [], ["delete"], ["create"], start, start, [], [], ["delete"]]


def test_a_training_that_gives_up_leaves_the_pod_to_be_looked_at(watch):
    ended, done = watch(("ACTIVE", "running,running"), ("ACTIVE", "ended 2,running"))
    assert ended.returncode == 1
    assert "given up" in ended.stdout and "ended 2" in ended.stdout
    assert done == [[], []]


def test_a_pod_that_cannot_be_had_is_not_asked_for_forever(watch, environment):
    environment["CREATE"] = "1"
    ended, done = watch(*[("", "")] * 9)
    assert ended.returncode == 1
    assert done == [["create"]] * 5


@pytest.fixture
def job(program, clone, environment):
    """Runs the batch script as Slurm does, from a copy elsewhere, with steps that end with these statuses."""

    def run(*statuses, state="RUNNING"):
        spool = clone.parent / "spool"
        spool.mkdir()
        shutil.copy(clone / "launch" / "slurm_gpu.sh", spool / "slurm_script")
        cases = " ".join(f"{index}) exit {status} ;;" for index, status in enumerate(statuses, 1))
        show = 'echo "flags $XLA_FLAGS, cache $JAX_COMPILATION_CACHE_DIR"'
        program("srun", f'{show}; case $(grep -c ^srun "$calls") in {cases} esac')
        program("squeue", f"echo {state}")
        program("scontrol", "")
        environment.update(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(clone), RESUME_PAUSE="0")
        (clone / "spool").symlink_to(spool)
        return call("../spool/slurm_script", *RUN, clone=clone, environment=environment)

    return run


def test_a_job_is_queued_again_when_it_has_saved_and_crashes_are_tried_again_in_place(job, calls):
    ended = job(76, 1, 75)
    assert ended.returncode == 75, ended.stderr
    assert [line.split()[0] for line in calls()] == ["srun", "srun", "srun", "squeue", "scontrol"]
    assert calls()[-1] == "scontrol requeue 7"
    assert "--xla_gpu_" in ended.stdout and "cache /bucket/it's/compiled" in ended.stdout


@pytest.mark.parametrize("status", [0, 2])
def test_a_job_that_has_finished_or_is_mistaken_is_not_queued_again(job, calls, status):
    assert job(status).returncode == status
    assert [line.split()[0] for line in calls()] == ["srun"]


def test_a_cancelled_job_stays_cancelled(job, calls):
    assert job(75, state="COMPLETING").returncode == 75
    assert not any(line.startswith("scontrol") for line in calls())


def test_kubectl_gets_the_manifest_that_the_dry_run_shows(program, clone, environment):
    words = ("gke.sh", *WAYS["gke.sh"], *RUN)
    program("kubectl", "cat")
    applied = call(*words, clone=clone, environment=environment)
    shown = call(*words, "--dry_run", clone=clone, environment=environment)
    assert applied.returncode == 0
    assert applied.stdout.splitlines() == shown.stdout.splitlines()[1:-1]
