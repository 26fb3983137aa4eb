#!/usr/bin/env bash
# Check and time what takes two processes on this machine's GPUs: tests/gpu/run_multi.sh [OUT]   (default build/gpu)
# One GPU will do for the checks; the times mean something with two. PYTHON chooses the interpreter.
# Exit status: 0 all right, 1 a result is wrong, 3 no usable GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-}"
if [ -z "$python" ]; then
  python=python3
  [ -x .venv/bin/python ] && python=.venv/bin/python
fi
unset TRITON_INTERPRET
exec "$python" -m tests.gpu.measure_two "${1:-build/gpu}"
