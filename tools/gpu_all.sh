#!/bin/bash
# Everything that claims to work on GPUs, on one host with two of them.
# bash tools/gpu_all.sh OUT [PART...]    parts: machine pairs two tests schedules tiny same study; all by default
# A line per part in OUT/summary.txt, what each printed in OUT/PART.log. Runs and data go to /tmp/gpu_all.
set -u
. tools/on_gpu.sh
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
parts=" ${*:-machine pairs two tests schedules tiny same study} "
at=/tmp/gpu_all
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
part data_study dsv3 data prepare python-stdlib --output $at/stdlib --vocab-size 16384

two_gpus=("parallel={world_size: 2, pipeline: 2}" "pipeline={schedule: dualpipe}" "training.micro_batch_size=4")
if wanted machine; then
  part doctor dsv3 doctor dsv3_tiny
  part preflight dsv3 preflight dsv3_tiny "${two_gpus[@]}" data.prepare.output=/tmp/tiny-data/stdlib
fi

# Both GPUs, alone: how much communication hides.
wanted pairs && part pairs tests tests/gpu/test_two_gpus.py -k "pairs and blockwise"
if wanted two; then # tiny models, mostly imports: beside each other
  for schedule in 1f1b dualpipe dualpipev zb1p; do
    part "two_$schedule" tests "tests/gpu/test_two_gpus.py::test_schedules[$schedule]" &
  done
  part two_dispatch tests tests/gpu/test_two_gpus.py -k fp8_dispatch &
  wait
fi
wanted schedules && part schedules python3 tools/gpu_schedules.py --gpus 2 --out "$out/schedules" --minutes 6

# One GPU each, the comparison of precisions on what is left of both.
if wanted study; then
  part study dsv3 numerics run dsv3_100m data.prepare.tokenizer=$at/stdlib.tokenizer.json \
    data.prepare.output=$at/python --variants blockwise --seeds 3 --paired --jobs 6 --out $at/study &
fi
if wanted tests; then
  CUDA_VISIBLE_DEVICES=1 part tests tests tests/gpu &
fi
wanted tiny && CUDA_VISIBLE_DEVICES=0 part tiny bash tools/gpu_tiny.sh "$out" 110 50
wanted same && CUDA_VISIBLE_DEVICES=0 part same bash tools/gpu_deterministic.sh /tmp/tiny-data/stdlib
wait
cp $at/study/report.* "$out" 2>/dev/null
say "all done"
