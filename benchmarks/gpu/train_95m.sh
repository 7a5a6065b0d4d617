#!/usr/bin/env bash
# The paper's 95M row on a GPU: full precision, BBQ (ours and as published), QuEST and LSQ at 4, 3, 2 and 1 bits.
#
#   benchmarks/gpu/train_95m.sh SOURCE                                # text: a file, a folder, hf:NAME, or token shards
#   MINUTES=50 TOKENS=300000000 OUT=gpu-95m benchmarks/gpu/train_95m.sh SOURCE
#   DRY=1 benchmarks/gpu/train_95m.sh SOURCE                          # sizes and memory of every run, and no run
#
# Runs come in the order of the grid until the minutes are over; the one that is cut short has saved, and goes on in the
# next call. So several calls add up to one table: bring OUT back with you. Needs `pip install 'bellbox[cli]'`.
# Not run on a GPU yet (docs/gpu.md).
set -euo pipefail
SOURCE=${1:?name the text, or the folder of token shards}
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
OUT=${OUT:-gpu-95m}
MINUTES=${MINUTES:-25}
TOKENS=${TOKENS:-100000000}
BATCH=${BATCH:-65536}  # tokens of a step
MICRO=${MICRO:-32}     # sequences of a pass; fewer where memory is short
PRESET=${PRESET:-95M}
VOCAB=${VOCAB:-32000} # null where SOURCE holds tokens already
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
cat > "$OUT/base.yaml" <<BASE
base: $ROOT/configs/paper/llama-95M.yaml
folder: $OUT/run
model: {preset: $PRESET}
data: {source: "$SOURCE", vocab_size: $VOCAB}
batch: {tokens: $BATCH, micro_sequences: $MICRO}
quantization: {method: bbq, share: true}
tokens: $TOKENS
device: $DEVICE
eval_every: 500
checkpoint_every: 100
BASE
cat > "$OUT/grid.yaml" <<'GRID'
about: LLaMA-95M on one GPU
base: base.yaml
bits: [4, 3, 2, 1]
rows:
  full precision: {quantization: {method: none}}
  BBQ: {quantization: {method: bbq}}
  "BBQ, paper": {quantization: {method: bbq_paper, share: false}}
  QuEST: {quantization: {method: quest}}
  LSQ: {quantization: {method: lsq}, bits: [4, 3, 2]}
GRID
if [[ -n ${DRY:-} ]]; then
  exec "$PYTHON" -m bellbox train --config "$OUT/grid.yaml" --dry-run
fi
# SIGINT has a run save and end in good order.
timeout --signal=INT --kill-after=120 "${MINUTES}m" \
  "$PYTHON" -m bellbox compare "$OUT/grid.yaml" --out "$OUT/results" || echo "ended with code $?"
