#!/usr/bin/env bash
# Check and measure the kernels, the steps made of them and whole pairs on this machine's GPU: tests/gpu/run.sh [OUT]
# OUT: default build/gpu. PYTHON chooses the interpreter. Exit status: 0 all right, 1 a result is wrong, 3 no usable GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-}"
if [ -z "$python" ]; then
  python=python3
  [ -x .venv/bin/python ] && python=.venv/bin/python
fi
unset TRITON_INTERPRET
status=0
for measure in measure_kernels measure_draft measure_steps measure_late measure_pair; do
  code=0
  "$python" -m "tests.gpu.$measure" "${1:-build/gpu}" || code=$?
  [ "$code" -eq 0 ] || status=$code
  [ "$code" -ne 3 ] || break
done
exit "$status"
