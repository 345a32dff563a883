#!/usr/bin/env bash
# The SSD tier on a machine with a GPU: tests, a profile with the drive, random policies against their predictions, one model
# held to a small machine's memory beside the drive alone.
#
#     bash benchmarks/ssd_on_gpu.sh PART FOLDER OUT
#
# PART: tests, profile, campaign, or 8b. FOLDER is on the drive and keeps the profile from part to part; results go to OUT.
set -euo pipefail
part=$1 folder=$2 out=$3
mkdir -p "$folder" "$out"
profile=$folder/profile.json
case $part in
tests)
    python3 -m pytest -q -x -p no:cacheprovider tests/runtime/test_gpu.py tests/runtime/test_saving_gpu.py -k "${ONLY:-}"
    ;;
profile)
    python3 -m planner profile --quick --model llama-3.1-8b --model llama-3.2-3b --micro-batch 4 --micro-batch 16 \
        --seq-len 1024 --kernels graphed --ssd "$folder" --name "${NAME:-here}" -o "$profile"
    cp "$profile" "$out/profile.json"
    ;;
campaign)
    # As long as the budget lasts; a second call goes on.
    if [ -d "$folder/campaign" ]; then where=(--resume "$folder/campaign"); else
        where=(-o "$folder/campaign" --profile "$profile" --ssd "$folder" --models qwen2.5-1.5b llama-3.2-3b --seq-len 1024 2048
            --global-batch 4 8 16 --gpu-memory 24GiB all --configurations 8 --runs-per-config 1)
    fi
    python3 benchmarks/campaign.py "${where[@]}" --budget-s "${BUDGET_S:-280}" --reports "$folder/reports"
    tar -C "$folder" -czf "$out/campaign.tar.gz" campaign reports
    ;;
8b)
    python3 -m planner simulate --model llama-3.1-8b --machine "$profile" --global-batch 16 --gpu-memory 24GiB \
        --host-memory 48GiB --ssd-memory 44GiB --effort 0.2 -o "$folder/8b.json"
    python3 benchmarks/ssd_tier.py "$folder/8b.json" "$folder" -o "$out/8b.json" --steps "${STEPS:-5}" --raw-gib 20
    cp "$folder"/run/comparison.txt "$out/8b-comparison.txt"
    gzip -c "$folder/8b.json" > "$out/8b-plan.json.gz"
    ;;
*)
    echo "ssd_on_gpu: part $part is none of tests, profile, campaign, 8b" >&2
    exit 2
    ;;
esac
