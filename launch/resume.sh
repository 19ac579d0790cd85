#!/bin/sh
# Runs a training again until it has finished. The same command continues from the newest checkpoint.
#
#   sh launch/resume.sh [--dry_run] COMMAND ...
#   sh launch/resume.sh .venv/bin/python -m emo_jax.train --config=... --workdir=... --preempted_status=75
#
# Ends with the command's status when that is 0 (finished), 2 (a mistake in config or input), 126 or 127 (no such
# program), 130 (Ctrl-C), or one of $RESUME_NOT_ON; when it was itself told to stop by SIGTERM or Ctrl-C, which it hands
# on as SIGTERM; and after $RESUME_FAILURES (3) failures in a row that each came within $RESUME_QUICK (600) seconds. A
# preemption (75) is no failure. Otherwise it starts the command again after $RESUME_PAUSE (10) seconds. Its own status
# goes to $RESUME_STATUS_FILE too, if that is set.

set -u

dry_run=''
if [ "${1:-}" = --dry_run ]; then dry_run=yes && shift; fi
case ${1:-} in
    '' | -*) echo 'resume.sh: which command? As in: sh launch/resume.sh python -m emo_jax.train ...' >&2 && exit 2 ;;
esac
if [ -n "$dry_run" ]; then
    echo "# again after every end but 0, 2, 126, 127, 130${RESUME_NOT_ON:+, $RESUME_NOT_ON}:"
    here=$(dirname "$0") options=''
    set -- -- "$@"
    # shellcheck source-path=SCRIPTDIR source=common.sh
    . "$here/common.sh"
    quote "$@"
    exit
fi

child='' told='' interrupted='' failures=0
# A shell starts what runs in the background with SIGINT ignored: SIGTERM it is, for both.
stop() {
    told=$1 interrupted=yes
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap 'stop TERM' TERM
trap 'stop INT' INT

say() { echo "resume.sh: $*" >&2; }
end() {
    if [ -n "${RESUME_STATUS_FILE:-}" ]; then echo "$1" >"$RESUME_STATUS_FILE"; fi
    exit "$1"
}

while :; do
    began=$(date +%s)
    "$@" &
    child=$!
    if [ -n "$told" ]; then stop "$told"; fi # it came while there was no child to hand it to
    wait "$child"
    status=$?
    # A signal ends a wait early, and the command is still saving; 127 when it has been waited for already.
    while [ -n "$interrupted" ]; do
        interrupted=''
        wait "$child"
        again=$?
        [ "$again" -eq 127 ] || status=$again
    done
    child=''
    seconds=$(($(date +%s) - began))

    case " 0 2 126 127 130 ${RESUME_NOT_ON:-} " in *" $status "*) end "$status" ;; esac
    case $told in
        TERM) end "$status" ;;
        INT) end 130 ;;
    esac
    failures=$((failures + 1))
    if [ "$status" -eq 75 ] || [ "$seconds" -ge "${RESUME_QUICK:-600}" ]; then failures=0; fi
    if [ "$failures" -ge "${RESUME_FAILURES:-3}" ]; then
        say "status $status after $seconds s. Failures in a row that came so soon: $failures. Giving up."
        end "$status"
    fi
    say "status $status after $seconds s; again in ${RESUME_PAUSE:-10} s."
    sleep "${RESUME_PAUSE:-10}" >/dev/null 2>&1 &
    wait $! # a signal must not have to wait for the pause
    if [ -n "$told" ]; then end "$status"; fi
done
