# Sourced by demo.sh and test.sh: a Python environment with this project in it. Needs bash and Python 3.11 or newer only.
# An active virtual environment is used as it is; else .venv is made beside the sources.
#   install_medqlora [EXTRA]     e.g. install_medqlora test
# MEDQLORA_SKIP_INSTALL=1 leaves an environment that you manage yourself as it is.

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "no Python 3.11 or newer found; install one, or name it with PYTHON=/path/to/python" >&2
    return 2
}

install_medqlora() {
    local extra=${1:+[$1]} python stamp
    [ -n "${MEDQLORA_SKIP_INSTALL:-}" ] && return 0
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
            python=$(find_python) || return 2
            "$python" -m venv .venv || {
                echo "cannot make .venv with $python; on Debian and Ubuntu its venv module is the package python3-venv" >&2
                return 2
            }
        fi
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
    # Installing again takes half a minute even when nothing is missing: do it when the metadata changed only.
    stamp="$VIRTUAL_ENV/.medqlora-$(cksum setup.cfg pyproject.toml | cksum | cut -d' ' -f1)${1:-}"
    [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$PWD" ] && return 0
    echo "installing medqlora$extra into $VIRTUAL_ENV (a few minutes the first time) …" >&2
    # torch first and by exact version where it is missing: a range resolves to the newest build, on some indexes with
    # gigabytes that this machine may not need. Any torch >= 2.11 that is there already is kept.
    python -c 'import torch' 2>/dev/null || python -m pip install --quiet "torch==${TORCH_VERSION:-2.13.0}" || return 1
    python -m pip install --quiet --editable ".$extra" || return 1
    echo "$PWD" >"$stamp"
}
