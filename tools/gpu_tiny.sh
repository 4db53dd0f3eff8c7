#!/bin/bash
# dsv3_tiny on one GPU as a user runs it: train, stop by TERM, resume, stop. Figures of both under $1.
# bash tools/gpu_tiny.sh OUT [SECONDS before TERM] [SECONDS of the resumed run], both from their first step on
set -u
. tools/on_gpu.sh
# shellcheck disable=SC2034  # first and resumed are read by name
out=$1 first=${2:-200} resumed=${3:-70}
run=/tmp/tiny-run
steps() { cat $run/metrics.jsonl 2>/dev/null | grep -c '"kind": "step"'; }
for part in first resumed; do
  seconds=${!part}
  before=$(steps)
  dsv3 train dsv3_tiny runtime.run_dir=$run data.prepare.output=/tmp/tiny-data/stdlib >"$out/tiny_$part.log" 2>&1 &
  pid=$!
  for _ in $(seq 250); do
    [ "$(steps)" != "$before" ] || ! kill -0 $pid 2>/dev/null && break
    sleep 1
  done
  for _ in $(seq "$seconds"); do kill -0 $pid 2>/dev/null || break; sleep 1; done
  pkill -TERM -P $pid
  wait $pid
  echo "$part: after $seconds s of steps and TERM: exit code $?, $(steps) steps"
done
cp $run/metrics.jsonl "$out/tiny_metrics.jsonl"
cp $run/recipe.yaml "$out/"
ls $run/checkpoints
grep -h 'is complete\|resumed' "$out"/tiny_*.log
