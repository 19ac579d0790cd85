"""Every way to start a training shows what it would do, anywhere, and says what is missing."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch.scripts import LAUNCH, RUN, SHELLS, SLICE, WAYS, call

SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def commands(printed: str) -> list[list[str]]:
    """The printed lines as a shell reads them, without the comments."""
    return [shlex.split(line) for line in printed.splitlines() if not line.startswith("#")]


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, "-x", *SCRIPTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_every_script_parses_in_every_shell(shell):
    for script in SCRIPTS:
        subprocess.run([shell, "-n", script], check=True)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("script", WAYS)
def test_a_dry_run_needs_nothing_installed_and_touches_nothing(script, shell, clone, environment):
    before = sorted(clone.rglob("*"))
    shown = call(script, *WAYS[script], *RUN, "--dry_run", clone=clone, environment=environment, shell=shell)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert sorted(clone.rglob("*")) == before


@pytest.mark.parametrize("script", ["local.sh", "processes.sh", "slurm_gpu.sh"])
def test_the_printed_commands_hold_the_options_as_given(script, clone, environment):
    shown = call(script, *WAYS[script], *RUN, "--dry_run", clone=clone, environment=environment)
    trainings = [words for words in commands(shown.stdout) if "emo_jax.train" in words]
    assert len(trainings) == {"local.sh": 1, "processes.sh": 3, "slurm_gpu.sh": 1}[script]
    for words in trainings:
        assert [word for word in words if word in RUN] == RUN


def test_processes_differ_in_their_number_and_share_the_gpus(clone, environment):
    environment["CUDA_VISIBLE_DEVICES"] = "2,3,4,5,6,7"
    shown = call("processes.sh", "3", *RUN, "--dry_run", clone=clone, environment=environment)
    settings = [
        set(words[1 : words.index(".venv/bin/python")]) for words in commands(shown.stdout) if words[0] == "env"
    ]
    own = [words - set.intersection(*settings) for words in settings]
    assert own == [{f"JAX_PROCESS_ID={i}", f"JAX_LOCAL_DEVICE_IDS={2 * i},{2 * i + 1}"} for i in range(3)]
    assert {"JAX_NUM_PROCESSES=3", "JAX_COORDINATOR_ADDRESS=127.0.0.1:29400"} <= set.intersection(*settings)


def test_slurm_starts_a_task_for_each_gpu_and_resumes_it_but_not_after_a_preemption(clone, environment):
    shown = call("slurm_gpu.sh", *WAYS["slurm_gpu.sh"], *RUN, "--dry_run", clone=clone, environment=environment)
    found = commands(shown.stdout)
    assert found[0][:4] == ["sbatch", "--nodes=4", "--gpus-per-node=2", "--ntasks-per-node=2"]
    assert found[0][-4:] == ["launch/slurm_gpu.sh", *RUN]
    assert ["export", "RESUME_NOT_ON=75"] in found
    assert found[-1][:3] == ["sh", "launch/resume.sh", "srun"]
    assert {"--distributed", "--preempted_status=75"} <= set(found[-1])
    assert "\n#SBATCH --requeue\n" in (LAUNCH / "slurm_gpu.sh").read_text()


def test_a_pod_is_asked_for_set_up_and_started_in_this_order(clone, environment):
    shown = call("tpu_pod.sh", *WAYS["tpu_pod.sh"], *RUN, "--dry_run", clone=clone, environment=environment)
    found = commands(shown.stdout)
    assert [words[3:5] for words in found if words[0] == "gcloud"] == [
        ["queued-resources", "create"],
        ["queued-resources", "describe"],
        ["tpu-vm", "scp"],
        *[["tpu-vm", "ssh"]] * 3,
        ["queued-resources", "delete"],
    ]
    assert all("--zone=us-east5-a" in words for words in found if words[0] == "gcloud")
    assert {"--spot", "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--node-id=emo"} <= set(
        found[0]
    )
    setup, start, _ = [words[-1].removeprefix("--command=") for words in found if "ssh" in words]
    assert setup.endswith("setup pail")
    assert shlex.split(start)[-4:] == ["start", *RUN]


def test_skypilot_gets_the_options_in_one_variable(clone, environment):
    shown = call("sky.sh", *WAYS["sky.sh"], *RUN, "--dry_run", clone=clone, environment=environment)
    (launched,) = [words for words in commands(shown.stdout) if words[0] == "sky"]
    assert {"--num-nodes=3", "--gpus=A100:8", "BUCKET=gs://pail"} <= set(launched)
    (options,) = [word.removeprefix("EMO_OPTIONS=") for word in launched if word.startswith("EMO_OPTIONS=")]
    assert shlex.split(options) == RUN


def test_gke_gets_the_options_as_they_are(clone, environment):
    odd = "--config.data.mixture=(\"a\\b\",'$(c)')"
    shown = call("gke.sh", *WAYS["gke.sh"], *RUN, odd, "--dry_run", clone=clone, environment=environment)
    jobset = yaml.safe_load(shown.stdout)
    (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    # Kubernetes would put a variable's value in place of $(c).
    wanted = ["--distributed", *RUN, odd.replace("$(", "$$("), "--preempted_status=75"]
    assert container["args"] == wanted, json.dumps(container["args"])


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("local.sh", ["--workdir=/w"], "--config="),
        ("local.sh", ["--config=c"], "--workdir="),
        ("local.sh", ["--config=c", "--workdir=/w", "--sopt"], "--sopt is no option here"),
        ("local.sh", ["--config=c", "--workdir=/w"], "install.sh"),
        ("resume.sh", [], "which command"),
        ("resume.sh", ["--pause=3", "true"], "which command"),
        ("processes.sh", RUN, "how many processes"),
        ("processes.sh", ["two", *RUN], "how many processes"),
        ("processes.sh", ["2", "--config=c", "--workdir=gs://b/c", "--dry_run"], "--workdir=DIR"),
        ("slurm_gpu.sh", ["--nodes=", *RUN], "--nodes=VALUE"),
        ("slurm_gpu.sh", ["--dry_run"], "--config="),
        ("tpu_pod.sh", [], "watch, up, run"),
        ("tpu_pod.sh", ["up", "--name=emo"], "--zone="),
        ("tpu_pod.sh", ["up", *SLICE, "--dry_run"], "--type="),
        ("tpu_pod.sh", ["up", *SLICE, "--type=v9-8", "--dry_run"], "--runtime="),
        ("tpu_pod.sh", ["run", *SLICE, "--dry_run", "--config=c", "--workdir=runs/emo"], "--bucket="),
        ("tpu_pod.sh", ["down", *SLICE], "Google Cloud CLI"),
        ("gke.sh", [*WAYS["gke.sh"][1:], *RUN, "--dry_run"], "--name=VALUE"),
        ("gke.sh", [*WAYS["gke.sh"], *RUN, "--topology=8by8", "--dry_run"], "4x4x4"),
        ("gke.sh", [*WAYS["gke.sh"], *RUN, "--topology=1x1", "--dry_run"], "--chips="),
        ("gke.sh", [*WAYS["gke.sh"], "--config=c", "--workdir=runs/emo", "--dry_run"], "/bucket/"),
        ("gke.sh", [*WAYS["gke.sh"], *RUN], "kubectl"),
        ("sky.sh", [*RUN, "--dry_run"], "--bucket="),
        ("sky.sh", [*WAYS["sky.sh"], *RUN], "skypilot"),
    ],
)
def test_a_mistake_is_answered_in_one_line_with_what_to_do(script, words, says, clone, environment):
    answered = call(script, *words, clone=clone, environment=environment)
    assert (answered.returncode, answered.stdout) == (2, "")
    assert re.fullmatch(rf"{script}: .*\n", answered.stderr), answered.stderr
    assert says in answered.stderr


def test_processes_that_cannot_share_the_gpus_are_refused(clone, environment):
    environment["CUDA_VISIBLE_DEVICES"] = "0,1,2"
    answered = call("processes.sh", "2", *RUN, "--dry_run", clone=clone, environment=environment)
    assert answered.returncode == 2
    assert "3 GPUs cannot be shared out evenly among 2" in answered.stderr


@pytest.mark.parametrize("script", WAYS)
def test_help_shows_the_header_with_the_command(script, clone, environment):
    shown = call(script, "--help", clone=clone, environment=environment)
    assert shown.returncode == 0
    assert f"sh launch/{script} " in shown.stdout
    assert "#" not in shown.stdout and "set -eu" not in shown.stdout


def test_the_readme_names_every_script():
    readme = (LAUNCH / "README.md").read_text()
    assert [script.name for script in SCRIPTS if script.name not in readme] == ["common.sh"]
