#!/bin/sh
# GPU nodes of any cloud through SkyPilot, as a managed job that survives preemptions (launch/skypilot.yaml).
#
#   sh launch/sky.sh --bucket=gs://BUCKET --nodes=2 --gpus=H100:8 \
#       --config=configs/emo_1b14b.py --workdir=/bucket/emo [--name=emo-jax] [--dry_run]
#
# Needs `pip install 'skypilot[gcp]'` (or another cloud), `sky check`, quota for the GPUs, and a bucket in which renaming a
# folder is atomic (launch/README.md). `sky jobs queue` and `sky jobs logs` watch it, `sky jobs cancel` ends it.

set -eu
here=$(dirname "$0") options='bucket= nodes= gpus= name=' bucket='' nodes=2 gpus=H100:8 name=emo-jax
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"
needs_run
case $bucket in *://?*) ;; *) die 'which bucket? Add --bucket=gs://NAME; it becomes /bucket on every node.' ;; esac
case $workdir in /bucket/?*) ;; *) die "--workdir=$workdir must lie in the bucket: --workdir=/bucket/FOLDER." ;; esac

needs sky "pip install 'skypilot[gcp]', then sky check"
run cd "$root"
run sky jobs launch launch/skypilot.yaml --yes --detach-run "--name=$name" "--num-nodes=$nodes" "--gpus=$gpus" \
    --env "BUCKET=$bucket" --env "EMO_CACHE=$workdir/compiled" --env "EMO_OPTIONS=$(quote "$@")"
