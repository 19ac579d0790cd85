#!/bin/sh
# A TPU pod slice from a queued resource, also a Spot one, which is asked for anew whenever it is taken away.
#
#   sh launch/tpu_pod.sh watch --name=emo --zone=us-east5-a --type=v5p-128 --spot \
#       --config=configs/emo_1b14b.py --workdir=gs://BUCKET/emo [--bucket=BUCKET] [--dry_run]
#
# watch   does all that follows, and again after preemptions, until the training has finished; then it deletes the slice
# up      asks for the slice           run     installs this clone's last commit on its hosts and starts the training
# status  of slice and training        logs    of host 0 (--worker=I: of another), until Ctrl-C
# stop    saves and ends the training  down    deletes the slice
#
# Needs gcloud, signed in, with quota for the type, and a bucket. With --bucket it becomes /bucket on every host, for what
# must be a folder: data.path, or a --workdir there (launch/tpu_host.sh). The training goes on without this script; only a lost slice needs it to come back.
# --runtime=VERSION names an image for other types than v4, v5e, v5p and v6e. For TPU7x there is launch/gke.sh.

set -eu
here=$(dirname "$0") options='name= zone= type= bucket= runtime= worker= spot' name='' zone='' type='' bucket='' runtime=''
worker=0 spot=''
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"
command=${1:-}
case $command in
    watch | up | run | status | logs | stop | down) shift ;;
    *) die 'what shall it do? watch, up, run, status, logs, stop or down, as in: sh launch/tpu_pod.sh watch --name=...' ;;
esac
[ -n "$name" ] && [ -n "$zone" ] || die 'which slice? Add --name=NAME --zone=ZONE.'
needs gcloud 'install the Google Cloud CLI and run gcloud auth login'
cd "$root"
case $command in
    watch | run)
        needs_run
        case $bucket:$workdir in
            ?*:/bucket/?* | *:gs://?*) ;;
            *)
                die 'the run must live where all hosts see it: --workdir=gs://BUCKET/NAME, or --bucket=BUCKET' \
                    '--workdir=/bucket/FOLDER.'
                ;;
        esac
        ;;
esac
case $command in
    watch | up)
        case ${runtime:-$type} in
            '') die 'how many chips of which kind? Add --type=TYPE, as in --type=v5p-128.' ;;
            v6e-*) runtime=v2-alpha-tpuv6e ;;
            v5p-*) runtime=v2-alpha-tpuv5 ;;
            v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
            v4-*) runtime=tpu-ubuntu2204-base ;;
            "$type") die "which image for $type? Add --runtime=VERSION." ;;
        esac
        ;;
esac

queued() { run gcloud compute tpus queued-resources "$@" "--zone=$zone"; }
state() { queued describe "$name" '--format=value(state.state)' 2>/dev/null || :; }
hosts() { run gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" "--worker=$1" "--command=$2"; }
on_host='cd emo_jax && sh launch/tpu_host.sh'
say() { echo "$(date '+%F %T') $*"; }

up() {
    queued create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime" ${spot:+--spot}
}
down() { queued delete "$name" --force --quiet; }
start() {
    run git archive --format=tar.gz --output=/tmp/emo_jax.tar.gz HEAD
    run gcloud compute tpus tpu-vm scp /tmp/emo_jax.tar.gz "$name:" "--zone=$zone" --worker=all
    hosts all "mkdir -p emo_jax && tar -xzf emo_jax.tar.gz -C emo_jax && $on_host setup $(quote "$bucket")"
    hosts all "$on_host start $(quote "$@")"
}

case $command in
    up) up ;;
    down) down ;;
    run) start "$@" ;;
    status) queued describe "$name" '--format=value(state.state)' && hosts all "$on_host state" ;;
    logs) hosts "$worker" 'sudo journalctl --unit=emo --lines=100 --follow' ;;
    stop) hosts all "$on_host stop" ;;
    watch)
        if [ -n "$dry_run" ]; then
            up
            echo '# Every minute, and all of this again after FAILED or SUSPENDED:'
            queued describe "$name" '--format=value(state.state)'
            echo '# Once it is ACTIVE:'
            start "$@"
            hosts all "$on_host state"
            echo '# When all hosts have ended with 0:'
            down
            exit
        fi
        failures=0
        while :; do
            found=$(state)
            case $found in
                '') if up; then failures=0; else failures=$((failures + 1)); fi ;;
                FAILED | SUSPENDED) say "the slice is $found: asking for another" && down || failures=$((failures + 1)) ;;
                ACTIVE)
                    found=$(hosts all "{ $on_host state; } 2>/dev/null || echo stopped" | sort | uniq -c) || found=''
                    case $found in
                        *stopped*) if start "$@"; then failures=0; else failures=$((failures + 1)); fi ;;
                        *'ended '[1-9]*)
                            say "the training has given up; the slice is still there (logs, run, down): $found"
                            exit 1
                            ;;
                        *running*) failures=0 ;;
                        *'ended 0'*) say 'the training has finished' && down && exit ;;
                    esac
                    ;;
            esac
            say "slice and hosts: $found"
            [ "$failures" -lt 5 ] || { say 'five failures in a row, giving up' && exit 1; }
            sleep 60
        done
        ;;
esac
