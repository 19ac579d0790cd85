"""The launch scripts as a user calls them, in a clone where nothing is installed."""

import shutil
import subprocess
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]
# What every Unix has. Neither Python nor git, gcloud, kubectl, sbatch or sky are among them.
TOOLS = ["cat", "date", "dirname", "env", "grep", "mkdir", "mkfifo", "mktemp", "rm", "sed", "seq", "sleep", "tee", "tr"]
RUN = ["--config=configs/my model.py", "--workdir=/bucket/it's", "--config.data.path=texts/*.gz"]

SLICE = ["--name=emo", "--zone=us-east5-a"]
# The options of each way that needs any, and the command's words before them.
WAYS = {
    "local.sh": [],
    "processes.sh": ["3"],
    "slurm_gpu.sh": ["--nodes=4", "--gpus=2"],
    "tpu_pod.sh": ["watch", *SLICE, "--type=v5p-128", "--bucket=pail", "--spot"],
    "gke.sh": [
        "--name=emo",
        "--image=registry/emo:1",
        "--bucket=pail",
        "--accelerator=tpu-v6e-slice",
        "--topology=8x8",
    ],
    "sky.sh": ["--bucket=gs://pail", "--nodes=3", "--gpus=A100:8"],
}


def bare(folder: Path) -> dict[str, str]:
    """An environment in which only the basic tools can be found."""
    tools = folder / "tools"
    tools.mkdir(parents=True)
    for tool in [*TOOLS, *SHELLS]:
        (tools / tool).symlink_to(shutil.which(tool))
    return {"PATH": str(tools), "HOME": str(folder)}


def call(script: str, *words: str, clone: Path, environment: dict[str, str], shell: str = "sh", **options):
    """What `SHELL launch/SCRIPT WORDS` printed and returned, called from a folder of its own."""
    command = [shutil.which(shell), str(clone / "launch" / script), *words]
    options = {"cwd": "/", "env": environment, "capture_output": True, "text": True, "timeout": 60, **options}
    return subprocess.run(command, **options)
