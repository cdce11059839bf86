#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, nvcc, torch, pybind11 and scikit-build-core: builds the wheel,
# runs the tests on the CPU and the GPU, the bundled model, and every kernel under compute-sanitizer.
# Needs no network. Usage: scripts/gpu.sh [OUTPUT FOLDER [PYTEST ARGS]]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
[ $# -gt 0 ] && shift
mkdir -p "$out"
status=0
python=${PYTHON:-python3}

echo "== build"
time "$python" -m pip install --quiet --no-build-isolation --no-deps . --config-settings=cmake.define.MOECORE_CUDA=ON
(cd "$out" && "$python" -m moecore doctor) || true
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

echo "== tests"
"$python" -m pytest -q -p no:cacheprovider "$@" || status=1

echo "== the bundled model"
for device in cpu cuda; do
    (cd "$out" && "$python" -m moecore generate "Once upon a time" --device "$device" --verbose \
        --temperature 0 --max-tokens 60)
done

echo "== compute-sanitizer"
for tool in memcheck racecheck synccheck initcheck; do
    printf '%s: ' "$tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" tests/gpu_smoke.py 2>&1 | tail -1
done
exit "$status"
