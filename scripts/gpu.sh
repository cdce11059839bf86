#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, nvcc, torch, pybind11 and scikit-build-core: builds the wheel, runs
# the tests on the CPU and the GPU, the bundled model, ranks, every kernel under compute-sanitizer, and
# the benchmarks. Needs no network. Writes OUTPUT FOLDER/<stage>.txt; every stage runs, whatever the
# ones before it gave.
#
#   scripts/gpu.sh [OUTPUT FOLDER [PYTEST ARGS]]
#   STAGES="build bench" scripts/gpu.sh     only these of: build tests model ranks sanitizer bench
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-build/gpu}")
[ $# -gt 0 ] && shift
mkdir -p "$out"
python=${PYTHON:-python3}
failed=()

stage() {
    local name=$1
    case " ${STAGES:-build tests model ranks sanitizer bench} " in *" $name "*) ;; *) return ;; esac
    printf '\n== %s (%s s)\n' "$name" "$SECONDS"
    (set -eo pipefail; "$@") 2>&1 | tee "$out/$name.txt" | tail -${TAIL:-60}
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$name")
}

build() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" -m pip install --quiet --no-build-isolation --no-deps . \
        --config-settings=cmake.define.MOECORE_CUDA=ON
    (cd "$out" && "$python" -m moecore doctor) || true  # it says what is missing, too
}
tests() {
    "$python" -m pytest -q -p no:cacheprovider "$@"
    echo "the kernel of GPUs before Hopper"
    MOECORE_CUDA_GEMM=sm80 "$python" -m pytest -q -p no:cacheprovider -k cuda \
        tests/test_grouped_gemm*.py tests/test_moe_layer.py
}
model() {
    for device in cpu cuda; do
        (cd "$out" && "$python" -m moecore generate "Once upon a time" --device "$device" --verbose \
            --temperature 0 --max-tokens 60)
    done
}
ranks() {
    "$python" tests/gpu_expert_parallel.py
    "$python" tests/gpu_expert_parallel_llm.py
}
sanitizer() {
    for tool in memcheck racecheck synccheck initcheck; do
        printf '%s: ' "$tool"
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" tests/gpu_smoke.py >"$out/$tool.log" 2>&1 ||
            { tail -30 "$out/$tool.log"; return 1; }
        tail -1 "$out/$tool.log"
        printf '%s of the kernel of GPUs before Hopper: ' "$tool"
        MOECORE_CUDA_GEMM=sm80 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" \
            tests/gpu_smoke.py grouped_gemm >"$out/$tool-sm80.log" 2>&1 ||
            { tail -30 "$out/$tool-sm80.log"; return 1; }
        tail -1 "$out/$tool-sm80.log"
    done
}
bench() {
    for shape in mixtral-8x7b qwen3-30b-a3b deepseek-v3/8 gpt-oss-20b; do
        "$python" bench/compare.py layer --device cuda --shape "$shape"
    done
    "$python" bench/compare.py model --device cuda
}

stage build
stage tests "$@"
for name in model ranks sanitizer bench; do stage "$name"; done
[ ${#failed[@]} -eq 0 ] || { printf '\nfailed: %s\n' "${failed[*]}"; exit 1; }
