#!/usr/bin/env bash
# Looks up known vulnerabilities of every package that tpllm is tested with, and of those installed
# here. Not part of .ci/run: a new advisory must not turn an unchanged commit red.
#
#     launch/audit.sh            # needs the network; installs pip-audit into .venv/audit
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv/audit
[ -x "$venv/bin/pip-audit" ] || {
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet pip-audit
}
# The list is complete, and nothing of it is installed; what cannot be looked up is a failure.
exec "$venv/bin/pip-audit" --requirement constraints-cpu.txt --no-deps --disable-pip --strict "$@"
