#!/usr/bin/env bash
# Step times of two versions of slideplan on one machine, in turns: did a change of structure cost speed?
#
#     bash benchmarks/before_after.sh OUT MACHINE BEFORE_ROOT BEFORE_PREFIX [BATCH ...]
#
# OUT: folder for results. MACHINE: profile's name or file, readable by both versions' catalogues. BEFORE_ROOT: checkout of the
# earlier version; BEFORE_PREFIX: what stands before its modules' names ("slideplan." up to 0.7, "" since). Default batches: 16 1.
set -euo pipefail
out=$1 machine=$2 before=$3 prefix=$4
shift 4
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
for batch in "${@:-16 1}"; do
    for turn in 1 2; do
        for version in before after; do
            root=$here modules=
            [ $version = before ] && root=$before modules=$prefix
            run=$out/$version-$batch-$turn
            (cd "$out" && PYTHONPATH=$root python3 -m "${modules}planner" simulate --model llama-3.1-8b --machine "$machine" \
                --seq-len 1024 --global-batch "$batch" -o "$run.json" > "$run.txt" 2>&1)
            (cd "$out" && PYTHONPATH=$root python3 -m "${modules}runtime" execute "$run.json" --steps 12 --lr 1e-5 -o "$run" \
                >> "$run.txt" 2>&1) || { tail -5 "$run.txt"; exit 1; }
            rm "$run.json"
            python3 - "$run" <<'PY'
import json, sys
run = sys.argv[1]
found = json.load(open(f"{run}/comparison.json"))
print(run.rsplit("/", 1)[1], {k: found["step"][k] / 1e9 for k in ("predicted", "measured")},
      {row["name"]: round(row["measured"] / 2**30, 2) for row in found["memory"]}, flush=True)
PY
        done
    done
done
