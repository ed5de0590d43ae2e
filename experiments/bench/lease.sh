#!/usr/bin/env bash
# The attention's tests and the benches on a GPU that is lent for minutes, most wanted first; what they say goes to $OUT.
# Its limits come to nine and a half minutes.
#
#   OUT=/tmp/out experiments/bench/lease.sh
#
# PYTHON  default python3, with this repository and its dependencies on its path
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?name the folder for the results in OUT}"
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
bench() { # name, seconds at most, module, options
    local name=$1 seconds=$2 module=$3
    shift 3
    timeout "$seconds" "$PYTHON" -m "experiments.bench.$module" --device cuda --table "$OUT/$name.md" "$@" || echo "$name: failed or cut"
}
# All kernels against float64, batches in shifts and in pieces: times of wrong results would be worth nothing.
timeout 150 "$PYTHON" -m pytest -q --noconftest -o addopts= tests/unit/test_attention_cuda.py >"$OUT/cuda_tests.txt" 2>&1 ||
    echo "attention's tests: failed or cut, see cuda_tests.txt"
tail -n 3 "$OUT/cuda_tests.txt"
bench train_step_xl 150 train_step --strategies none kv_concat
bench attention 120 attention --plans first+previous "window(3)" all --frames 16 64 --tokens 1024 --images 0 N --budget 60
bench train_step_b 150 train_step --sizes B --batch 8 --compile false \
    --strategies none adaln token_bank kv_concat query_projection in_context
