#!/usr/bin/env bash
# Check and measure the kernels on this machine's GPU: tests/gpu/run.sh [OUT]   (default build/gpu)
# PYTHON chooses the interpreter. Exit status: 0 all right, 1 a kernel is wrong, 3 no usable GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-}"
if [ -z "$python" ]; then
  python=python3
  [ -x .venv/bin/python ] && python=.venv/bin/python
fi
unset TRITON_INTERPRET
exec "$python" -m tests.gpu.measure_kernels "${1:-build/gpu}"
