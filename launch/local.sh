#!/bin/sh
# One process on this machine: its CPU, its GPUs, or the chips of a single TPU VM.
#
#   sh launch/local.sh --config=configs/emo_tiny.py --workdir=runs/emo_tiny [--resume] [--dry_run]
#
# Needs what `sh .ci/install.sh base` (or tpu, cuda13) makes. With --resume it goes on after preemptions and crashes
# (launch/resume.sh). On NVIDIA GPUs it sets launch/gpu_flags.sh.

set -eu
here=$(dirname "$0") options='resume' resume=''
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"
needs_run
needs_python

set -- "$python" -m emo_jax.train "$@"
if [ -n "$resume" ]; then set -- sh launch/resume.sh "$@" --preempted_status=75; fi
if command -v nvidia-smi >/dev/null && [ "${JAX_PLATFORMS:-}" != cpu ]; then
    # shellcheck source-path=SCRIPTDIR source=gpu_flags.sh
    . launch/gpu_flags.sh
fi
[ -n "$dry_run" ] || exec "$@"
quote cd "$root"
quote "$@"
