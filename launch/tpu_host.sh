#!/bin/sh
# What launch/tpu_pod.sh calls on each host of a slice, in the folder emo_jax of its home.
#
#   sh launch/tpu_host.sh setup [BUCKET] | start TRAINING_OPTIONS ... | state | stop
#
# Training and bucket are system services: they outlive ssh, a shutdown ends the training with SIGTERM, and the bucket
# stays mounted until that has saved.

set -eu
cd "$(dirname "$0")/.."
export PATH="$HOME/.local/bin:$PATH" DEBIAN_FRONTEND=noninteractive
status_file=$HOME/emo.status
command=${1:-}
[ $# -eq 0 ] || shift

case $command in
    setup)
        # The images of today have Python 3.10.
        if ! sh .ci/find_python.sh >/dev/null 2>&1; then
            curl -LsSf https://astral.sh/uv/install.sh | sh
            uv python install 3.12
        fi
        sh .ci/install.sh tpu,gcs
        if [ -z "${1:-}" ]; then exit; fi
        if ! command -v gcsfuse >/dev/null; then
            key=/usr/share/keyrings/cloud.google.asc
            curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
            echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
                sudo tee /etc/apt/sources.list.d/gcsfuse.list
            sudo apt-get update -q
            sudo apt-get install -qy gcsfuse
        fi
        if ! mountpoint -q /bucket; then
            sudo mkdir -p /bucket
            sudo systemctl reset-failed emo-bucket 2>/dev/null || :
            # No cached metadata: every host must see at once what another has written.
            sudo systemd-run --unit=emo-bucket --property=After=network-online.target \
                gcsfuse --foreground -o allow_other --uid="$(id -u)" --gid="$(id -g)" --metadata-cache-ttl-secs=0 "$1" /bucket
            for _ in 1 2 3 4 5 6; do mountpoint -q /bucket || sleep 5; done
            mountpoint -q /bucket || { echo "tpu_host.sh: no $1 at /bucket: journalctl -u emo-bucket" >&2 && exit 1; }
        fi
        ;;
    start)
        sh "$0" stop
        rm -f "$status_file"
        cache=''
        for word; do case $word in --workdir=*) cache=${word#*=}/compiled ;; esac; done
        sudo systemd-run --unit=emo --uid="$(id -un)" --working-directory="$PWD" \
            --property=After=emo-bucket.service --property=KillMode=mixed --property=TimeoutStopSec=120 \
            --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \
            --setenv=HOME="$HOME" --setenv=RESUME_STATUS_FILE="$status_file" --setenv=PYTHONUNBUFFERED=1 \
            --setenv=JAX_COMPILATION_CACHE_DIR="$cache" \
            sh launch/resume.sh .venv/bin/python -m emo_jax.train --distributed "$@" --preempted_status=75
        ;;
    state)
        if systemctl is-active --quiet emo; then
            echo running
        elif [ -e "$status_file" ] && [ "$(cat "$status_file")" != 75 ]; then
            echo "ended $(cat "$status_file")"
        else
            echo stopped
        fi
        ;;
    stop)
        sudo systemctl stop emo 2>/dev/null || :
        sudo systemctl reset-failed emo 2>/dev/null || :
        ;;
    *) echo 'tpu_host.sh: setup [BUCKET], start OPTIONS ..., state or stop? launch/tpu_pod.sh calls it.' >&2 && exit 2 ;;
esac
