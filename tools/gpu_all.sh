#!/bin/bash
# Everything that claims to work on GPUs, on one host with two of them or more.
# bash tools/gpu_all.sh OUT [PART...]    by default machine pairs two schedules elastic tests tiny same checkpoint study
# A line per part in OUT/summary.txt, what each printed in OUT/PART.log. Runs and data go to /tmp/gpu_all.
set -u
. tools/on_gpu.sh
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
parts=" ${*:-machine pairs two schedules elastic tests tiny same checkpoint study} "
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
wanted study && part data_study dsv3 data prepare python-stdlib --output $at/stdlib --vocab-size 16384

two_gpus=("parallel={world_size: 2, pipeline: 2}" "pipeline={schedule: dualpipe}" "training.micro_batch_size=4")
if wanted machine; then
  part doctor dsv3 doctor dsv3_tiny
  part preflight dsv3 preflight dsv3_tiny "${two_gpus[@]}" data.prepare.output=/tmp/tiny-data/stdlib faults.hang_seconds=60
fi

# How much communication hides: alone on the machine.
wanted pairs && part pairs tests tests/gpu/test_two_gpus.py -k "pairs and (fp8 or report)"

# The comparison of precisions on all GPUs but the last (of two, on both), and beside it what is right or wrong at any speed.
last=$((gpus - 1))
if wanted study; then
  CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus > 2 ? last - 1 : last))) \
    part study dsv3 numerics run dsv3_100m data.prepare.tokenizer=$at/stdlib.tokenizer.json \
    data.prepare.output=$at/python --variants blockwise --seeds 3 --paired --jobs 6 --out $at/study &
fi
if wanted two; then # tiny models, mostly imports
  for schedule in 1f1b dualpipe dualpipev zb1p; do
    part "two_$schedule" tests "tests/gpu/test_two_gpus.py::test_schedules[$schedule]" &
  done
  part two_dispatch tests tests/gpu/test_two_gpus.py -k fp8_dispatch &
fi
most=$((gpus >= 8 ? 8 : gpus >= 4 ? 4 : 2))
schedules() { part "$1" python3 tools/gpu_schedules.py --gpus $most --out "$out/schedules" --minutes "$2" --parts "$1"; }
alone() { CUDA_VISIBLE_DEVICES=$last part "$@"; }
wanted tests && alone tests tests tests/gpu
wanted tiny && alone tiny bash tools/gpu_tiny.sh "$out" 110 50
wanted same && alone same bash tools/gpu_deterministic.sh /tmp/tiny-data/stdlib
wanted elastic && schedules elastic 10
wanted checkpoint && alone checkpoint python3 tools/bench_checkpoint.py dsv3_tiny
wait
cp $at/study/report.* "$out" 2>/dev/null

# Speed and memory of every schedule: alone too.
wanted schedules && schedules schedules $((most > 2 ? 9 : 6))
say "all done"
