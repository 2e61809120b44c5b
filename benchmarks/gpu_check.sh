#!/usr/bin/env bash
# What this machine's NVIDIA GPU has to show: the tests on it, and the benchmarks beside their rivals, as dated JSON.
#
#     benchmarks/gpu_check.sh [--part tests,loss,topk,attention,patch,model,step,vlm,decode|all] [--quick] [--minutes 8] [--out DIR] [--peers DIR]
#
# Runs from a checkout with whatever PyTorch and Triton $PYTHON (python3) has, installs nothing and needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python3}")
export PATH="$(dirname "$PYTHON"):$PATH" # cmake and ninja may lie beside it
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

start=$SECONDS
if [ "${VLMFAST_NO_EXT:-}" != 1 ]; then
    # An old setuptools does not read pyproject.toml; CMake builds without it, too.
    "$PYTHON" setup.py --quiet build_ext --inplace || {
        cmake -S . -B build/gpu-check -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$PYTHON" \
            -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/vlmfast"
        cmake --build build/gpu-check --target _C --parallel
    } || echo "gpu_check: the extension was not built" >&2
fi
exec "$PYTHON" benchmarks/gpu_check.py --spent $((SECONDS - start)) "$@"
