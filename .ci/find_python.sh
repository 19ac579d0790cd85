#!/bin/sh
# Prints the path of a Python >= 3.12 that can make virtual environments, or what to install and exits 1.
# Each candidate is run: a pyenv shim may exist for a version that is not installed, and Debian splits venv off.
# Uses shell built-ins only, so it works whatever PATH holds.
set -u

check='
import sys
if sys.version_info < (3, 12):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import venv, ensurepip
except ImportError:
    sys.exit("lacks venv: Python %d.%d" % sys.version_info[:2])
print(sys.executable)
'

tried=''
lacks_venv=''

# Prints the real path of the candidate $1 and ends the search, or notes why it will not do.
try() {
    case $1 in
        */*) [ -x "$1" ] || return 0 ;;
        *) command -v "$1" >/dev/null 2>&1 || return 0 ;;
    esac
    if answer=$("$1" -c "$check" 2>&1) && [ -x "$answer" ]; then
        printf '%s\n' "$answer"
        exit 0
    fi
    case $answer in
        'is Python '*) why=$answer ;;
        'lacks venv: '*)
            why="${answer#lacks venv: }, but without the venv and ensurepip modules"
            lacks_venv=${answer#lacks venv: Python }
            ;;
        *) why='does not run' ;;
    esac
    tried="$tried
  $1 ($why)"
}

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON"
    printf 'PYTHON=%s cannot be used (%s); looking for another.\n' "$PYTHON" "${why:-no such program}" >&2
fi
for name in python3.12 python3.13 python3.14 python3 python; do
    try "$name"
done
for pyenv in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
    [ -n "$pyenv" ] || continue
    for path in "$pyenv"/versions/3.1[2-9]*/bin/python; do
        try "$path"
    done
done
if command -v uv >/dev/null 2>&1 && path=$(uv python find --system '>=3.12' 2>/dev/null); then
    try "$path"
fi

{
    printf '%s\n' 'emo_jax needs Python 3.12 or newer, with its venv module, and found none.'
    if [ -n "$tried" ]; then
        printf 'Tried:%s\n' "$tried"
    fi
    if [ -n "$lacks_venv" ]; then
        printf '\nPython %s is here, only its venv module is missing. On Debian or Ubuntu:\n' "$lacks_venv"
        printf '  sudo apt install python%s-venv\n' "$lacks_venv"
    fi
    printf '\n%s\n' 'Any one of these installs a Python that will do:'
    printf '  %-18s %s\n' \
        'Ubuntu 24.04:' 'sudo apt install python3.12 python3.12-venv' \
        'Debian 13:' 'sudo apt install python3 python3-venv   (Debian 12 has only 3.11: use uv, pyenv or conda)' \
        'macOS:' 'brew install python@3.12' \
        'pyenv:' 'pyenv install 3.12' \
        'uv:' 'uv python install 3.12' \
        'conda:' 'conda create -n emo python=3.12 && conda activate emo'
    printf '\n%s\n' 'Then run make again. To name one yourself: make PYTHON=/path/to/python3.12 ...'
} >&2
exit 1
