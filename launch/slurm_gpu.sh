#!/bin/sh
# GPU nodes under Slurm: one process per GPU, each found by the others through Slurm's environment.
#
#   sh launch/slurm_gpu.sh --nodes=4 --gpus=8 --config=configs/emo_1b14b.py --workdir=/shared/emo [--dry_run]
#
# Submits itself with sbatch, from a clone that all nodes see, with `sh .ci/install.sh cuda13` done in it. Partition,
# account and time limit come from SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT. Two minutes before the limit,
# and when Slurm preempts it, the job saves (75) and queues itself again; crashes are retried in place (launch/resume.sh).

#SBATCH --job-name=emo_jax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --exclusive
set -eu
here=$(dirname "$0") options='nodes= gpus=' nodes=1 gpus=8
# Slurm runs a copy of this file; the repository is where it was submitted.
if [ ! -e "$here/common.sh" ]; then here=$SLURM_SUBMIT_DIR/launch; fi
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"
needs_run

if [ -z "${SLURM_JOB_ID:-}" ]; then
    needs_python
    needs sbatch 'submit from a login node of the cluster'
    run sbatch "--nodes=$nodes" "--gpus-per-node=$gpus" "--ntasks-per-node=$gpus" "--chdir=$root" launch/slurm_gpu.sh "$@"
    [ -n "$dry_run" ] || exit 0
    echo '# and on the first node, when the job starts:'
fi

# shellcheck source-path=SCRIPTDIR source=gpu_flags.sh
. launch/gpu_flags.sh
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$workdir/compiled}"
# JAX gives process i of a node its GPU i, so each has to see all of them. A process that has saved and left must not
# make Slurm kill those that are still at it; when one is lost, the others notice and end by themselves.
set -- srun --gpu-bind=none --kill-on-bad-exit=0 "$python" -m emo_jax.train --distributed "$@" --preempted_status=75
if [ -n "$dry_run" ]; then
    echo '. launch/gpu_flags.sh'
    quote export "JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR"
    quote export RESUME_NOT_ON=75
    quote sh launch/resume.sh "$@"
    exit
fi
status=0
RESUME_NOT_ON=75 sh launch/resume.sh "$@" || status=$?
# A job that its user has cancelled is COMPLETING by now, and stays cancelled.
if [ "$status" -eq 75 ] && [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
