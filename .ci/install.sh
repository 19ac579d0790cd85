#!/bin/sh
# Makes .venv unless a usable one is there, then installs emo_jax into it, editable.
# Usage: .ci/install.sh base | EXTRA[,EXTRA...]      (the extras of setup.py; base: none)
set -eu
cd "$(dirname "$0")/.."

case ${1:-base} in
    base) extras='' ;;
    *) extras="[$1]" ;;
esac
python=.venv/bin/python
log=.venv/install.log

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    found=$(sh .ci/find_python.sh)
    if [ -e .venv ]; then
        echo 'Making .venv anew: its Python is missing or older than 3.12.'
    fi
    echo "Making .venv with $found"
    "$found" -m venv --clear .venv
fi
# An interrupted venv, or one made by uv, has no pip.
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --upgrade >/dev/null

echo "Installing emo_jax$extras and what it needs into .venv (the first time takes a few minutes)"
: >"$log"
run_pip() {
    status=0
    "$python" -m pip install --disable-pip-version-check --progress-bar off --editable ".$extras" 2>&1 || status=$?
    echo "pip exited with $status"
}
# One line that keeps changing on a terminal, two lines in a log file; pip's own words go to $log.
show_progress() {
    code=1
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        case $line in
            'pip exited with '*) code=${line##* } ;;
            'Installing collected packages: '*) note "Unpacking $(printf '%s' "$line" | wc -w | awk '{ print $1 - 3 }') packages" ;;
            'Collecting '* | *'Downloading '* | *'Using cached '*'.whl'*) if [ -t 1 ]; then note "${line# }"; fi ;;
        esac
    done
    if [ -t 1 ]; then printf '\r\033[K'; fi
    return "$code"
}
note() {
    if [ -t 1 ]; then printf '\r\033[K  %.76s' "$1"; else printf '  %s\n' "$1"; fi
}
if ! run_pip | show_progress; then
    echo "pip could not install emo_jax$extras. The end of what it said (all of it: $log):" >&2
    grep -v -e '^Looking in ' -e '^Requirement already satisfied' "$log" | tail -n 25 >&2
    exit 1
fi
