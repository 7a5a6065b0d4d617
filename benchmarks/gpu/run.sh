#!/usr/bin/env bash
# Checks, times and tabulates the Triton backend on a bare machine with a GPU, PyTorch and Triton; no network.
#
#   benchmarks/gpu/run.sh                   # everything, at most eight minutes; results in gpu-results/
#   benchmarks/gpu/run.sh                   # once more: goes on with the parts that are not finished
#   OUT=elsewhere benchmarks/gpu/run.sh kernels decode
#   benchmarks/gpu/run.sh --dry             # without a GPU: tries the script in Triton's interpreter, at tiny sizes
#
# Before the first run on a new GPU: python benchmarks/gpu/tune.py. Not run on a GPU yet (docs/gpu.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-results}
LIMIT=${LIMIT:-480} # seconds
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export BELLBOX_BACKEND=
if [[ " $* " == *" --dry "* ]]; then
  export TRITON_INTERPRET=1 BELLBOX_BACKEND=triton
fi
code=0
# What was measured before the limit stays in results.jsonl; the interrupt still writes the tables.
timeout --signal=INT --kill-after=30 "$LIMIT" "$PYTHON" benchmarks/gpu/measure.py --out "$OUT" "$@" || code=$?
echo "results: $OUT/results.jsonl, $OUT/tables.md"
exit $code
