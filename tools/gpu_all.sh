#!/bin/bash
# Everything that claims to work on GPUs, on one host with two of them or more.
# bash tools/gpu_all.sh OUT [PART...]    by default machine hidden pairs two branch elastic tests tiny same checkpoint schedules
# A line per part in OUT/summary.txt, what each printed in OUT/PART.log. Runs and data go to /tmp/gpu_all.
set -u
. tools/on_gpu.sh
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
parts=" ${*:-machine hidden pairs two branch elastic tests tiny same checkpoint schedules} "
at=/tmp/gpu_all
gpus=$(nvidia-smi --list-gpus | wc -l)
mkdir -p $at
start=$(date +%s)
say() { echo "[$(($(date +%s) - start)) s] $*" | tee -a "$out/summary.txt"; }
wanted() { [[ $parts == *" $1 "* ]]; }
part() { # NAME COMMAND...
  local name=$1 code=0
  shift
  say "$name: begins"
  "$@" >"$out/$name.log" 2>&1 || code=$?
  say "$name: exit code $code, $(tail -n 1 "$out/$name.log")"
}
tests() { python3 -m pytest -q -s -p no:cacheprovider "$@"; }

part data_tiny dsv3 data prepare python-stdlib --output /tmp/tiny-data/stdlib --vocab-size 32000 --fim-rate 0.1
if wanted study || wanted branch; then # its tokenizer
  part data_study dsv3 data prepare python-stdlib --output $at/stdlib --vocab-size 16384
fi

two_gpus=("parallel={world_size: 2, pipeline: 2}" "pipeline={schedule: dualpipe}" "training.micro_batch_size=4")
if wanted machine; then
  part doctor dsv3 doctor dsv3_tiny
  part preflight dsv3 preflight dsv3_tiny "${two_gpus[@]}" data.prepare.output=/tmp/tiny-data/stdlib faults.hang_seconds=60
fi

# How much communication hides: alone on the machine. Layers of the report's size on two GPUs, with its options in FP8.
hidden() {
  local report sequences
  for sequences in 1 2; do
    for pairs in false true; do
      report=$out/hidden_${sequences}_$pairs
      CUDA_VISIBLE_DEVICES=0,1 dsv3 profile run dsv3_671b_8xh200 "parallel={world_size: 2, expert: 2}" \
        "pipeline={schedule: 1f1b, overlap_pairs: $pairs}" model.num_hidden_layers=2 model.n_routed_experts=16 \
        model.n_group=1 model.topk_group=1 training.micro_batch_size=$sequences schedule.batch_size=$((12 * sequences)) \
        --balanced --ranks all --steps 1 --json --out "/tmp/gpu_all/hidden" >"$report.json" || return
      python3 - "$report.json" <<'PY'
import json, sys

found = json.load(open(sys.argv[1]))
for rank in found["ranks"]:
    all_of, pairs = rank["hidden_fraction"], rank["pairs"]
    print(sys.argv[1], f"{1e3 * found['speed']['step_seconds']:.0f} ms a step, hidden {all_of:.1%}", pairs)
PY
    done
  done
}
wanted hidden && part hidden hidden
wanted pairs && part pairs tests tests/gpu/test_two_gpus.py -k "pairs and report and 1"

# The comparison of precisions on all GPUs but the last (of two, on both), and beside it what is right or wrong at any speed:
# branch from a BF16 run of 38M tokens, study from scratch (docs/fp8.md).
last=$((gpus - 1))
training=$(seq -s, 0 $((gpus > 2 ? last - 1 : last)))
text=("data.prepare.tokenizer=$at/stdlib.tokenizer.json" "data.prepare.output=$at/python")
compare() { dsv3 numerics run dsv3_100m "${text[@]}" --variants blockwise --seeds 3 --paired --jobs 6 --out "$@"; }
branch() {
  dsv3 train dsv3_100m "${text[@]}" runtime.run_dir=$at/trunk training.duration=38M \
    'schedule.lr=[{linear: [0, 8e-4], until: 300 steps}, {constant: 8e-4}]' &&
    compare $at/branch checkpoint.load=$at/trunk
}
wanted branch && CUDA_VISIBLE_DEVICES=$training part branch branch &
wanted study && CUDA_VISIBLE_DEVICES=$training part study compare $at/study &
if wanted two; then # tiny models, mostly imports
  for schedule in 1f1b dualpipe dualpipev zb1p; do
    part "two_$schedule" tests "tests/gpu/test_two_gpus.py::test_schedules[$schedule]" &
  done
  part two_dispatch tests tests/gpu/test_two_gpus.py -k fp8_dispatch &
fi
most=$((gpus >= 8 ? 8 : gpus >= 4 ? 4 : 2))
sequences=$(($(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1) >= 100000 ? 2 : 1)) # MiB
schedules() {
  part "$1" python3 tools/gpu_schedules.py --gpus $most --out "$out/schedules" --minutes "$2" --parts "$1" \
    --micro-batch-size $sequences
}
alone() { CUDA_VISIBLE_DEVICES=$last part "$@"; }
last_gpu() {
  wanted tests && alone tests tests tests/gpu
  wanted same && alone same bash tools/gpu_deterministic.sh /tmp/tiny-data/stdlib
  wanted tiny && alone tiny bash tools/gpu_tiny.sh "$out" 110 50
  wanted checkpoint && alone checkpoint python3 tools/bench_checkpoint.py dsv3_tiny
}
last_gpu &
wanted elastic && schedules elastic 10
wait
for one in branch study; do
  for file in "$at/$one"/report.*; do [ -e "$file" ] && cp "$file" "$out/${one}_$(basename "$file")"; done
done

# Speed and memory of every schedule: alone too.
wanted schedules && schedules schedules $((most > 2 ? 9 : 6))
say "all done"
