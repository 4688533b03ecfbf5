# Sourced by the other scripts: makes .venv if there is none and installs what requirements.lock pins, once per lock.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: requirements.lock needs Python 3.11 or newer, \`$PYTHON\` is $("$PYTHON" --version)" >&2
        echo "hint: PYTHON=python3.11 $0" >&2
        exit 2
    }
    echo "making .venv" >&2
    "$PYTHON" -m venv .venv
fi
stamp=.venv/installed.lock
if ! cmp -s requirements.lock "$stamp"; then
    echo "installing (a few minutes the first time)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
    cp requirements.lock "$stamp"
fi
