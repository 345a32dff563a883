#!/usr/bin/env bash
# Triton kernels under compute-sanitizer: accesses outside memory, races in shared memory, wrong barriers.
#
#     bash benchmarks/sanitize.sh [FILE]      # on a machine with an NVIDIA GPU; a summary goes to FILE
#
# The tests compare every kernel with float64 on odd shapes; here they only have to run. Exit code 1: something was found.
set -uo pipefail
cd "$(dirname "$0")/../tests"
out=${1:-/dev/null}
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
failed=0
: > "$out"
for tool in memcheck racecheck synccheck; do
    "$sanitizer" --tool "$tool" --error-exitcode 9 --report-api-errors no --target-processes all \
        python3 -m pytest -q -p no:cacheprovider runtime/test_operators.py runtime/test_kernels.py -k "triton or gpu_update" \
        > /tmp/sanitize.log 2>&1
    code=$?
    echo "$tool: exit $code: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY| passed| failed' /tmp/sanitize.log | tr '\n' ' ')" | tee -a "$out"
    [ $code -eq 0 ] || { failed=1; tail -30 /tmp/sanitize.log; }
done
exit $failed
