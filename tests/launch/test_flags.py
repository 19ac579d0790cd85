"""The flags for GPUs are ones that the installed XLA knows: it aborts at an unknown one."""

import os
import subprocess
import sys

from tests.launch.scripts import LAUNCH


def sourced(**environment: str) -> dict[str, str]:
    script = f'. \'{LAUNCH}/gpu_flags.sh\'; echo "$XLA_FLAGS"; echo "$XLA_PYTHON_CLIENT_MEM_FRACTION"'
    lines = subprocess.check_output(["sh", "-euc", script], env={"PATH": os.environ["PATH"], **environment}, text=True)
    flags, fraction = lines.splitlines()
    return {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_MEM_FRACTION": fraction}


def started_with(flags: str) -> subprocess.CompletedProcess:
    """XLA reads the flags of all platforms on any platform."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True, text=True
    )


def test_xla_knows_every_flag():
    flags = sourced()["XLA_FLAGS"]
    assert "--xla_gpu_" in flags
    started = started_with(flags)
    assert started.returncode == 0, started.stderr


def test_an_unknown_flag_would_be_noticed():
    started = started_with(sourced()["XLA_FLAGS"] + " --xla_gpu_never_heard_of=true")
    assert started.returncode != 0
    assert "xla_gpu_never_heard_of" in started.stderr


def test_what_is_set_already_wins():
    mine = {"XLA_FLAGS": "--xla_gpu_autotune_level=0", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    found = sourced(**mine)
    assert found["XLA_FLAGS"].endswith(" --xla_gpu_autotune_level=0")  # of two values, XLA takes the last
    assert found["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
