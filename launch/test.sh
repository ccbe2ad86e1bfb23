#!/usr/bin/env bash
# Install what the tests need and run them.
#   bash launch/test.sh [PYTEST ARGUMENTS]         everything that needs no other service
#   bash launch/test.sh --all [PYTEST ARGUMENTS]   also kills in number, Slurm, vLLM, a browser, the
#                                                  full merge grid and every documented command
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
selection=(-m "not full")
if [ "${1:-}" = --all ]; then
    selection=()
    export MEDQLORA_KILLS="${MEDQLORA_KILLS:-4}"
    shift
fi
# shellcheck source=launch/install.sh
. launch/install.sh
install_medqlora test || exit $?
ruff check .
ruff format --check --quiet .
# Tests of one file share what they make, so a file stays with one worker. A worker takes about 1 GB.
exec python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
    ${selection[@]+"${selection[@]}"} "$@"
