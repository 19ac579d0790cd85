# Read by the other scripts, never run: options, messages, and commands that --dry_run prints instead.
# A script names its own options in $options, each of which is also a variable with its default; the rest goes to
# emo_jax.train: --config=FILE --config.FIELD=VALUE --workdir=DIR --profile_steps=FIRST:LAST, and all that follows `--`.
# shellcheck shell=sh disable=SC2034,SC2154

dry_run='' workdir='' config=''
root=$(cd "$here/.." && pwd)

# One line that says what to do, and the status of a mistake in what was given.
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# The words as a shell reads them back.
quote() {
    line=''
    for word; do
        case $word in
            '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
        esac
        line="$line $word"
    done
    printf '%s\n' "${line# }"
}

# Runs a command, or prints it.
run() {
    if [ -n "$dry_run" ]; then quote "$@"; else "$@"; fi
}

rest=''
for word; do
    shift
    key=${word#--}
    key=${key%%=*}
    case $rest$word in
        --) rest=yes && continue ;;
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
        --dry_run) dry_run=yes && continue ;;
        --config=?*) config=${word#*=} ;;
        --workdir=?*) workdir=${word#*=} ;;
        --config.*=* | --profile_steps=* | --preempted_status=*) ;;
        --*)
            case " $options " in
                *" $key= "*)
                    case $word in *=?*) ;; *) die "$word needs a value: --$key=VALUE." ;; esac
                    eval "$key=\${word#*=}"
                    ;;
                *" $key "*) eval "$key=yes" ;;
                *)
                    die "$word is no option here. It takes --config=FILE --workdir=DIR --config.FIELD=VALUE --dry_run" \
                        "$(for option in $options; do printf -- '--%s ' "$option"; done)(--help says more)."
                    ;;
            esac
            continue
            ;;
    esac
    set -- "$@" "$word"
done

# Both must be there before anything starts; paths are relative to the repository.
needs_run() {
    [ -n "$config" ] || die 'which model? Add --config=FILE, as in --config=configs/emo_tiny.py.'
    [ -n "$workdir" ] || die 'where shall the run live? Add --workdir=DIR; the same DIR continues it.'
    cd "$root" || exit
}

# A program that the real thing calls, and how to come by it.
needs() {
    [ -n "$dry_run" ] || command -v "$1" >/dev/null || die "there is no $1 here: $2."
}

# The Python that trains here: $EMO_PYTHON, or the one that .ci/install.sh makes.
python=${EMO_PYTHON:-.venv/bin/python}
needs_python() {
    needs "$python" "run \`sh .ci/install.sh base\` (or tpu, cuda13) first, or set EMO_PYTHON"
}
