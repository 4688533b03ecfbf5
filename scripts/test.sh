#!/usr/bin/env bash
# Everything a change must pass: format, lint, types, tests. Sets itself up on a machine with Python and pip.
# Further words go to pytest: ./scripts/test.sh -k kmeans
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

.venv/bin/ruff format --check --quiet . || { echo "error: run \`.venv/bin/ruff format .\`" >&2; exit 1; }
.venv/bin/ruff check --quiet .
.venv/bin/mypy
# one thread each, as many processes as there are cores: most tests are too small for more threads
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} .venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
