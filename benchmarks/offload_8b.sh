#!/usr/bin/env bash
# Profile this GPU machine, then plan and run the Llama-3.1-8B shape with everything in host memory.
#
#   benchmarks/offload_8b.sh OUT_DIR [MODEL] [GLOBAL_BATCH...]
#
# Writes OUT_DIR/profile.json and one run folder per global batch (plan, measurement, comparison, trace).
# Needs one GPU and about 110 GiB of RAM for 8B. Random weights, sequence length 1024, ten steps.
set -euo pipefail
out=$1
model=${2:-llama-3.1-8b}
shift $(($# < 2 ? $# : 2))
batches=("$@")
[ $# -gt 0 ] || batches=(8 16)
mkdir -p "$out"
python3 -m planner profile --model "$model" --seq-len 1024 \
    --micro-batch 1 --micro-batch 2 --micro-batch 4 --micro-batch 8 --micro-batch 16 \
    --name "${PROFILE_NAME:-here}" -o "$out/profile.json"
for batch in "${batches[@]}"; do
    python3 -m planner simulate --model "$model" --machine "$out/profile.json" --seq-len 1024 \
        --global-batch "$batch" --placement host -o "$out/plan-$batch.json"
    python3 -m runtime execute "$out/plan-$batch.json" --steps 10 --output "$out/batch-$batch"
    rm "$out/plan-$batch.json"
done
