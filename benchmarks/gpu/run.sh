#!/usr/bin/env bash
# Checks, times and tabulates the Triton backend on a bare machine with a GPU, PyTorch and Triton; no network.
#
#   benchmarks/gpu/run.sh                   # everything, in about eight minutes; results in gpu-results/
#   OUT=elsewhere benchmarks/gpu/run.sh kernels decode
#
# Not run on a GPU yet (docs/gpu.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-results}
LIMIT=${LIMIT:-480} # seconds
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export BELLBOX_BACKEND=
# What was measured before the limit stays in results.jsonl.
timeout --signal=INT "$LIMIT" "$PYTHON" benchmarks/gpu/measure.py --out "$OUT" "$@" || echo "ended with code $?"
echo "results: $OUT/results.jsonl, $OUT/tables.md"
