#!/usr/bin/env bash
# Install what the tests need and run them:  bash launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/install.sh
. launch/install.sh
install_medqlora test || exit $?
ruff check .
ruff format --check --quiet .
exec python -m pytest "$@"
