#!/usr/bin/env bash
# Make the virtual environment and install vlmpack into it. Safe to run again; does nothing if up to date.
#   EXTRAS=demo scripts/setup.sh      (default: dev)     VENV=.venv     PYTHON=python3
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
extras=${EXTRAS:-dev}
stamp="$venv/.installed-$extras"
if [ -f "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ] && [ ! constraints.txt -nt "$stamp" ]; then
  exit 0
fi
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
echo "installing vlmpack[$extras] into $venv (torch on the CPU; two to five minutes the first time)"
# torch first and alone: a range would take the CUDA build, several GB, on Linux.
"$venv/bin/python" -m pip install -q --disable-pip-version-check -r constraints.txt
"$venv/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extras]"
touch "$stamp"
