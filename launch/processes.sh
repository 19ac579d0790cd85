#!/bin/sh
# N processes of one job on this machine: to try out what a pod does, or one process per group of GPUs.
#
#   sh launch/processes.sh N --config=configs/emo_tiny.py --workdir=runs/two [--dry_run]
#   sh launch/resume.sh sh launch/processes.sh N ... --preempted_status=75
#
# GPUs are shared out evenly; without them each process has $JAX_NUM_CPU_DEVICES (1) CPU devices. All write to
# WORKDIR/logs/process-I.log, process 0 to the terminal too. SIGTERM and Ctrl-C go to all of them, as SIGTERM. When one
# fails, the others are ended (killed after $EMO_GRACE, 90 s), and its status is returned. $EMO_PORT: a port instead of
# a free one. Not for a TPU host, whose chips belong to one process.

set -eu
here=$(dirname "$0") options=''
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"
case ${1:-} in
    '' | 0* | *[!0-9]*) die 'how many processes? As in: sh launch/processes.sh 2 --config=FILE --workdir=DIR' ;;
esac
count=$1
shift
needs_run
needs_python
case $workdir in *://*) die "--workdir=$workdir is no folder, and logs go there too: --workdir=DIR." ;; esac

gpus=0
if [ "${JAX_PLATFORMS:-}" = cpu ]; then
    :
elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr , '\n' | grep -c .)
elif command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi -L | grep -c '^GPU' || :)
fi
share=$((gpus / count))
[ $((share * count)) -eq "$gpus" ] ||
    die "$gpus GPUs cannot be shared out evenly among $count processes: set CUDA_VISIBLE_DEVICES to fewer."
if [ "$gpus" -gt 0 ]; then
    # shellcheck source-path=SCRIPTDIR source=gpu_flags.sh
    . launch/gpu_flags.sh
fi
port=${EMO_PORT:-29400}
if [ -z "$dry_run${EMO_PORT:-}" ]; then
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

# Process $1 of the job, in place of the shell that calls it: its pid takes the signals. Or its command, printed.
process() {
    gpu_ids=''
    if [ "$share" -gt 0 ]; then gpu_ids=$(seq -s, "$(($1 * share))" "$(($1 * share + share - 1))"); fi
    id=$1
    shift
    set -- env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$id" \
        ${gpu_ids:+"JAX_LOCAL_DEVICE_IDS=${gpu_ids%,}"} "$python" -m emo_jax.train --distributed "$@"
    [ -n "$dry_run" ] || exec "$@"
    printf '%s >>%s 2>&1 &\n' "$(quote "$@")" "$(quote "$log")"
}
stop() {
    for pair in $left; do kill "-$1" "${pair#*:}" 2>/dev/null || :; done
}

if [ -n "$dry_run" ]; then
    quote cd "$root"
    quote mkdir -p "$workdir/logs"
else
    mkdir -p "$workdir/logs"
    pipe=$(mktemp -d)
    trap 'rm -rf "$pipe"' EXIT
    mkfifo "$pipe/0"
    tee -a "$workdir/logs/process-0.log" <"$pipe/0" &
    tee=$!
fi
left='' index=0 told=''
trap told=yes TERM INT # until all can be reached
while [ "$index" -lt "$count" ]; do
    log=$workdir/logs/process-$index.log
    if [ -n "$dry_run" ]; then
        process "$index" "$@"
    else
        if [ "$index" -eq 0 ]; then out=$pipe/0; else out=$log; fi
        process "$index" "$@" >>"$out" 2>&1 &
        left="$left $index:$!"
    fi
    index=$((index + 1))
done
trap 'stop TERM' TERM INT
if [ -n "$told" ]; then stop TERM; fi

status=0 deadline=''
while [ -n "$left" ]; do
    still=''
    for pair in $left; do
        if kill -0 "${pair#*:}" 2>/dev/null; then
            still="$still $pair"
            continue
        fi
        ended=0
        wait "${pair#*:}" || ended=$?
        if [ "$ended" -eq 0 ] || [ "$status" -ne 0 ]; then continue; fi
        status=$ended
        # Preempted (75): the others have saved too and are ending.
        if [ "$status" -eq 75 ]; then continue; fi
        echo "processes.sh: process ${pair%:*} ended with status $status; see $workdir/logs/process-${pair%:*}.log" >&2
        stop TERM
        deadline=$(($(date +%s) + ${EMO_GRACE:-90}))
    done
    left=$still
    if [ -n "$deadline" ] && [ "$(date +%s)" -ge "$deadline" ]; then stop KILL; fi
    if [ -n "$left" ]; then sleep 0.2 || :; fi
done
if [ -z "$dry_run" ]; then wait "$tee" || :; fi
exit "$status"
