#!/usr/bin/env bash
# The largest models that one machine trains for real: planned first, then run for some steps.
#
#     bash benchmarks/largest_on_gpu.sh profile FOLDER OUT MODEL...
#     GPU=80GiB HOST=118GiB SSD=44GiB STATE=lean bash benchmarks/largest_on_gpu.sh run FOLDER OUT MODEL
#
# FOLDER is on the drive and keeps the profile from part to part; results go to OUT.
set -euo pipefail
part=$1 folder=$2 out=$3
shift 3
mkdir -p "$folder" "$out"
profile=$folder/profile.json
case $part in
profile)
    models=()
    for model in "$@"; do models+=(--model "$model"); done
    python3 -m planner profile --quick "${models[@]}" --micro-batch 4 --micro-batch 8 --seq-len 1024 --kernels graphed \
        --ssd "$folder" --name "${NAME:-here}" -o "$profile"
    cp "$profile" "$out/profile.json"
    ;;
run)
    name=$1-${STATE:-exact}
    python3 -m planner simulate --model "$1" --machine "$profile" --global-batch "${BATCH:-16}" --seq-len 1024 --state "${STATE:-exact}" \
        --gpu-memory "${GPU:-80GiB}" --host-memory "${HOST:-118GiB}" --ssd-memory "${SSD:-0}" --effort 0.2 -o "$folder/plan.json" \
        > "$out/$name-plan.txt"
    rm -rf "$folder/run"
    python3 -m runtime execute "$folder/plan.json" --steps "${STEPS:-5}" --warmup 1 --lr 1e-5 --no-save --ssd "$folder" \
        -o "$folder/run" || { cat "$out/$name-plan.txt"; exit 1; }
    cp "$folder/run/comparison.txt" "$out/$name-comparison.txt"
    cp "$folder/run/metrics.jsonl" "$out/$name-metrics.jsonl"
    cat "$out/$name-comparison.txt"
    ;;
*)
    echo "largest_on_gpu: part $part is none of profile, run" >&2
    exit 2
    ;;
esac
