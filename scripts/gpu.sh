#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, nvcc, torch, pybind11 and scikit-build-core: builds the wheel,
# runs the op tests on the CPU and the GPU, and every kernel under compute-sanitizer.
# Needs no network. Usage: scripts/gpu.sh [OUTPUT FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}

echo "== build"
time "$python" -m pip install --quiet --no-build-isolation --no-deps . --config-settings=cmake.define.MOECORE_CUDA=ON
(cd "$out" && "$python" -m moecore)
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

echo "== tests"
"$python" -m pytest -q -p no:cacheprovider tests/test_topk_routing.py tests/test_sort_by_expert.py \
    tests/test_grouped_gemm.py tests/test_combine.py tests/test_moe_layer.py tests/test_devices.py \
    tests/test_embedding.py tests/test_rms_norm.py tests/test_rotary_embedding.py

echo "== compute-sanitizer"
for tool in memcheck racecheck synccheck initcheck; do
    printf '%s: ' "$tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" tests/gpu_smoke.py 2>&1 | tail -1
done
