#!/usr/bin/env bash
# Bellbox against other libraries, on this machine, in the same rounds.
#
#   benchmarks/peers/run.sh                                   # all: layers at 1 and 2 threads, then models; takes an hour
#   benchmarks/peers/run.sh layers.py --shapes 4096x4096 --rows 1 --threads 1
#   benchmarks/peers/run.sh models.py --preset 95M --threads 1
#
# The first call makes benchmarks/peers/.venv (llama.cpp is compiled: some ten minutes). A peer that does not install is
# left out, and the output says so.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=$here/.venv
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
if [ ! -e "$venv/.ready" ]; then
    "${PYTHON:-python3.11}" -m venv "$venv"
    "${pip[@]}" torch==2.13.0 --constraint "$root/constraints.txt"
    "${pip[@]}" --constraint "$root/constraints.txt" "$root[cli]"
    grep -v '^#' "$here/requirements.txt" | while read -r peer; do
        CMAKE_ARGS="-DGGML_NATIVE=ON" "${pip[@]}" torch==2.13.0 "$peer" || echo "$peer did not install" >&2
    done
    touch "$venv/.ready"
fi
"${pip[@]}" --no-deps --force-reinstall "$root"  # Bellbox as it is now
cd "$here"
export PYTHONPATH="${PYTHONPATH:-}"
if [ $# -gt 0 ]; then
    exec "$venv/bin/python" "$@"
fi
for threads in 1 2; do
    "$venv/bin/python" layers.py --threads "$threads" --json "$here/layers-$threads.json"
    for preset in 95M 300M; do
        "$venv/bin/python" models.py --preset "$preset" --threads "$threads" --json "$here/models-$preset-$threads.json"
    done
done
