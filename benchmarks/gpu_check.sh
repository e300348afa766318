#!/usr/bin/env bash
# All that needs a GPU, in less than eight minutes and without a network: build, operator tests on CUDA and Triton,
# compute-sanitizer, benchmarks against the measured copy bandwidth. One JSON comes out; a step that fails is in it,
# and in the exit status, and does not keep the next from running.
#
#     benchmarks/gpu_check.sh [FOLDER]     FOLDER: where the JSON goes, else benchmarks/results
#
# PYTHON names the Python that has torch (else python3); COMMIT is recorded where there is no .git to ask.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$(realpath "${1:-$here/results}")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$work/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
unset TRITON_INTERPRET
failed=0

# step,seconds: run it for at most so long, and note how it ended.
step() {
  local start=$SECONDS status=0
  echo "== $1 (at most $2 s)"
  timeout --kill-after=5 "$2" "$python" "$here/gpu_check.py" "$1" "$work" || status=$?
  printf '%s\t%s\t%s\n' "$1" "$status" "$((SECONDS - start))" >>"$work/phases.tsv"
  echo "== $1: status $status after $((SECONDS - start)) s"
  [ "$status" = 0 ] || failed=1
}

step machine 20
[ "$failed" = 0 ] || exit 2 # no CUDA device: it has said so
step build 100
step tests 105
step sanitize 125
step bench $((465 - SECONDS)) # what the others left
"$python" "$here/gpu_check.py" merge "$work" "$folder"
exit "$failed"
