#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The state of the GPU side in one command: builds the working tree, runs all CUDA tests, all GPU benches
# and the compute-sanitizer tools on every operator; writes gpu_check.json, gpu_check.md and
# gpu_check.log to $OUT, or to bench/out. No network is needed; docs/gpu-check.md says what is.
# A stage that fails or runs out of time does not stop the next ones; one that ends with 77 was skipped.
# `--cpu` runs the same stages on the CPU and the emulator, with tiny benches, so that CI keeps this
# script working.
set -uo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."
root=$PWD
device=cuda
[ "${1:-}" = --cpu ] && device=cpu
out=${OUT:-$root/bench/out}
work=$root/build/gpu-check
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-525}))
base=${PYTHON:-python3}
python=$work/venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
rm -rf "$work/results" "$out"/gpu_check.*
mkdir -p "$work/results" "$out"
exec > >(tee "$out/gpu_check.log") 2>&1

# stage NAME SECONDS COMMAND...: within its own limit and what is left of the whole. SIGINT, so that
# pytest still writes its results; by default a background job ignores it, and its children do.
stage() {
  local name=$1 limit=$2 begin=$SECONDS left=$((deadline - SECONDS)) rc=124
  shift 2
  [ "$limit" -gt "$left" ] && limit=$left
  printf '\n==== %s (at most %d s)\n' "$name" "$limit"
  if [ "$limit" -gt 0 ]; then
    timeout --signal=INT --kill-after=5 "$limit" env --default-signal=INT "$@"
    rc=$?
  fi
  printf '%s\t%d\t%d\n' "$name" "$rc" $((SECONDS - begin)) >> "$work/results/stages.tsv"
  printf '==== %s: status %d, %d s\n' "$name" "$rc" $((SECONDS - begin))
}

environment() {
  "$base" --version
  uname -srm
  echo "commit ${STRUCTMAT_COMMIT:-$(git rev-parse HEAD 2> /dev/null || echo unknown)}"
  [ "$device" = cpu ] || { nvcc --version | tail -n 2 && nvidia-smi; }
}

# An environment of our own over the packages of the one in use, which stays as it is.
build() {
  set -e
  rm -rf "$work/venv"
  "$base" -m venv --without-pip "$work/venv"
  "$base" -c 'import sys
print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' > "$("$python" -c \
    'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
  local install=("$base" -m pip --python "$python" install --quiet --no-deps --no-index)
  if ! "$python" -c 'import scipy_openblas32' 2> /dev/null; then
    local wheel
    wheel=$(find .whl -name 'scipy_openblas32-*.whl' 2> /dev/null | sort | tail -n 1)
    [ -n "$wheel" ] || { echo "scipy-openblas32 is neither installed nor in .whl/"; return 1; }
    "${install[@]}" "$wheel"
  fi
  local settings=("build-dir=build/gpu-check/$device" cmake.define.STRUCTMAT_WERROR=ON)
  if [ "$device" = cuda ]; then
    settings+=(cmake.define.STRUCTMAT_CUDA=ON)
  else
    settings+=(cmake.define.STRUCTMAT_CUDA=OFF cmake.define.STRUCTMAT_EMULATE=ON
      cmake.define.CMAKE_CXX_FLAGS_RELEASE=-O1) # half the time: nothing here is measured
  fi
  # cmake and ninja may be packages of that environment: their programs lie beside its python.
  PATH=$(dirname "$("$base" -c 'import sys; print(sys.executable)')"):$PATH "${install[@]}" \
    --no-build-isolation --force-reinstall "${settings[@]/#/--config-settings=}" .
  cd "$work" # away from the sources
  "$python" -c 'import structmat, torch
print("structmat", structmat.__version__, "torch", torch.__version__, "CUDA", torch.version.cuda)
print("CUDA kernels built in:", torch.ops.structmat.has_cuda())'
}

tests() {
  local backends=(--backend cuda)
  # The emulator takes the place of the GPU; a part of the tests is enough to try the stage.
  [ "$device" = cpu ] && backends=(--backend cuda-emulated -k "streams and float32")
  STRUCTMAT_REQUIRE_CUDA=1 STRUCTMAT_REQUIRE_EMULATED=1 "$python" -m pytest -q tests "${backends[@]}" \
    -p no:cacheprovider --junitxml="$work/results/tests.xml"
}

# Machine code and NVIDIA's headers need the CUDA toolkit, but no GPU.
toolkit() {
  [ "$device" = cuda ] || { echo "skipped: a build without CUDA"; return 77; }
  "$python" -m pytest -q tests/test_sass.py tests/test_cublas_api.py -p no:cacheprovider
}

sanitizer() {
  local command=("$python" tests/operations.py "$device")
  if [ "$device" = cuda ] && ! command -v compute-sanitizer; then
    echo "skipped: no compute-sanitizer on the PATH"
    return 77
  fi
  # Our kernels only: all others would take minutes. No caching allocator: it hides overruns.
  [ "$device" = cpu ] || command=(compute-sanitizer --tool "$1" --error-exitcode 1
    --kernel-name kernel_substring=structmat "${command[@]}")
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${command[@]}"
}

bench() {
  local arguments=(--device cuda)
  [ "$device" = cpu ] && arguments=(--device cpu --tiny)
  "$python" "$1" "${arguments[@]}" --json "$work/results/$(basename "$1" .py).json"
}

export -f environment build tests toolkit sanitizer bench
export device work base python
# What is most worth knowing comes first: a stage gets no more than its limit, nor than what is left of
# the whole. The compression of a model, the longest bench, takes the rest.
stage environment 10 bash -c environment
stage build 150 bash -c build
if (cd "$work" && "$python" -c 'import structmat'); then
  stage tests 130 bash -c tests
  stage bench_low_rank 60 bash -c "bench bench/bench_low_rank.py"
  stage bench_svd 75 bash -c "bench bench/bench_svd.py"
  stage monarch_on_gpu 45 bash -c "bench bench/monarch_on_gpu.py"
  stage sparse_low_rank_on_gpu 45 bash -c "bench bench/sparse_low_rank_on_gpu.py"
  for file in bench/bench_*.py; do
    case $file in */bench_low_rank.py | */bench_svd.py | */bench_compress.py) continue ;; esac
    stage "$(basename "$file" .py)" 25 bash -c "bench $file"
  done
  tools=(memcheck racecheck initcheck synccheck)
  [ "$device" = cpu ] && tools=(memcheck) # without compute-sanitizer all are the same
  for tool in "${tools[@]}"; do
    stage "$tool" 20 bash -c "sanitizer $tool"
  done
  stage toolkit 20 bash -c toolkit
  stage bench_compress 150 bash -c "bench bench/bench_compress.py"
fi
"$base" bench/gpu_report.py "$work/results" "$out" "$device"
