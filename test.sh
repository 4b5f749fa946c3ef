#!/usr/bin/env bash
# Sets up a virtual environment and runs the tests in it: ./test.sh [pytest arguments]
# Needs Python 3.11 or later with pip, and no GPU. PYTHON chooses the interpreter, VENV the folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${PYTHON:-python3}
venv=${VENV:-.venv/test}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "test.sh: $python is not Python 3.11 or later; set PYTHON to one that is" >&2
    exit 1
fi
if ! [ -x "$venv/bin/python" ] && ! "$python" -m venv "$venv"; then
    echo "test.sh: $python cannot make virtual environments (on Debian: apt install python3-venv)" >&2
    exit 1
fi
"$venv/bin/python" -m pip install --quiet --no-compile --constraint constraints-cpu.txt \
    --editable '.[dev]'
# Once, on all cores, where pip would compile one module after the other, and none of an editable
# install's. A module that does not compile is one for another Python, which nobody imports.
if ! [ -e "$venv/compiled" ]; then
    "$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" tpllm launch || true
    touch "$venv/compiled"
fi
exec "$venv/bin/python" -m pytest "$@"
