#!/usr/bin/env bash
# Everything that needs a GPU, in order of importance, each stage under its own time limit; rows and logs land in $OUT as they
# come. A stage that fails does not stop the next.
#
#   bash bench/on_gpu.sh [STAGE...]      stages: build smoke tests llm ops gevp sanitizer ncu bench
# llm holds the Fisher passes, the readings, the merges and the whole (stages of `python -m bench.llm --help`).
#   LLM_ARGS="--stages passes evidence merge"  LLM_LIMIT=360  TESTS="tests/test_ops_kernels.py"  OPS_ARGS=--quick  GEVP_ARGS=...
#   SMOKE_LIMIT=400                      where the smoke stage is rehearsed on a CPU
#   SST_COMMIT=abc1234                   where the tree is a copy without git
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-$PWD/bench-output}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
mkdir -p "$OUT"
LOG="$OUT/log.txt"
SUMMARY="$OUT/summary.txt"
STAGES=("$@")
[ ${#STAGES[@]} -eq 0 ] && STAGES=(build smoke llm tests ops gevp sanitizer ncu)
jobs=$(nproc)

# stage NAME SECONDS COMMAND...: output to the log, one line of outcome to the summary.
stage() {
    local name=$1 limit=$2 begin=$SECONDS rc
    shift 2
    printf '\n===== %s =====\n' "$name" >>"$LOG"
    timeout --kill-after=10 "$limit" "$@" >>"$LOG" 2>&1
    rc=$?
    printf '%-10s rc=%-3s %4ss of %ss\n' "$name" "$rc" $((SECONDS - begin)) "$limit" | tee -a "$SUMMARY"
}

{
    date -u +%FT%TZ
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    python3 -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
} 2>&1 | tee -a "$SUMMARY"

for name in "${STAGES[@]}"; do
    case $name in
    build)
        export SST_CUDA_ARCHITECTURES="${SST_CUDA_ARCHITECTURES:-90}" MAX_JOBS="$jobs"
        stage build 240 python3 setup.py build_ext --inplace
        python3 -c "from sst_kernels import _native; _native.cpu(); _native.cuda(); print('both modules load')" 2>&1 | tail -n 2 | tee -a "$SUMMARY"
        ;;
    smoke) # every stage of the LLM bench on a small shape, seconds each: says what will fail before the expensive run does
        stage smoke "${SMOKE_LIMIT:-120}" python3 -m bench.llm --scale small --repeats 2 --out "$OUT/llm_smoke.csv"
        ;;
    tests)
        stage tests "${TESTS_LIMIT:-240}" python3 -m pytest -q -p no:cacheprovider -m gpu --timeout 120 -n "${TESTS_JOBS:-4}" \
            --maxfail 40 ${TESTS:-tests}
        grep -hE '^(FAILED|ERROR)|^E  |passed|failed' "$LOG" | tail -n 25 | cut -c1-220
        ;;
    ops) stage ops "${OPS_LIMIT:-150}" python3 -m bench.ops ${OPS_ARGS:---quick} --out "$OUT/ops.csv" ;;
    gevp) stage gevp "${GEVP_LIMIT:-170}" python3 -m bench.gevp_cuda ${GEVP_ARGS:---seconds 140} --out "$OUT/gevp_cuda.csv" ;;
    llm) stage llm "${LLM_LIMIT:-360}" python3 -m bench.llm --out "$OUT/llm.csv" ${LLM_ARGS:-} ;;
    sanitizer)
        for tool in memcheck racecheck; do
            for part in ops reading gevp; do
                PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool-$part" "${SANITIZER_LIMIT:-60}" compute-sanitizer --tool "$tool" \
                    --error-exitcode 7 --print-limit 20 python3 -m bench.capture "$part" --small --capture
            done
        done
        ;;
    ncu)
        # ncu refuses a whole run for one metric that the chip does not have.
        known=$(timeout 30 ncu --query-metrics 2>/dev/null | awk '{print $1}')
        metrics=$(for metric in $(python3 -c "from bench.capture import NCU_COLUMNS; print(*NCU_COLUMNS)"); do
            case $metric in launch__*) echo "$metric" ;; *) grep -qx "${metric%%.*}" <<<"$known" && echo "$metric" ;; esac
        done | paste -sd,)
        for part in ${NCU_PARTS:-ops gevp}; do
            stage "ncu-$part" 60 ncu --clock-control none --profile-from-start off --csv --page raw --log-file "$OUT/ncu_raw_$part.csv" \
                --launch-count "${NCU_LAUNCHES:-60}" --metrics "$metrics" python3 -m bench.capture "$part" --capture
        done
        python3 -m bench.capture table "$OUT"/ncu_raw_*.csv --out "$OUT/ncu.csv" >>"$LOG" 2>&1 && rm -f "$OUT"/ncu_raw_*.csv
        ;;
    bench) stage bench 200 python3 -m pytest bench -q -p no:cacheprovider --benchmark ;; # rows in $OUT/benchmark.csv
    *) echo "unknown stage $name" | tee -a "$SUMMARY" ;;
    esac
done

echo "===== errors in the log =====" && grep -nE "Error|error:|Traceback|ERROR SUMMARY|RACECHECK" "$LOG" | tail -n 20 | cut -c1-200
echo "===== rows =====" && grep -E " (pass|evidence|decision|gevp|filter|export|merge|end to end) .* ms=" "$LOG" | cut -c1-200
echo "===== summary =====" && cat "$SUMMARY"
