#!/bin/bash
# dsv3_tiny on one GPU as a user runs it: train, stop by TERM, resume. Figures of both under $1.
# bash tools/gpu_tiny.sh OUT [SECONDS before TERM] [SECONDS of the resumed run]
set -u
out=$1 first=${2:-200} second=${3:-70}
at=/tmp/dsv3-path  # the command's parts, without installing the package
mkdir -p $at && ln -sfn "$PWD/cli" $at/dsv3_cli && ln -sfn "$PWD/recipes" $at/dsv3_recipes
export PYTHONPATH=$PYTHONPATH:$at
run=/tmp/tiny-run
for seconds in "$first" "$second"; do
  python3 -m dsv3_cli.main train dsv3_tiny runtime.run_dir=$run data.prepare.output=/tmp/tiny-data/stdlib >"$out/tiny_$seconds.log" 2>&1 &
  pid=$!
  for _ in $(seq 250); do grep -q '^{' $run/metrics.jsonl 2>/dev/null && break; sleep 1; done
  for _ in $(seq "$seconds"); do kill -0 $pid 2>/dev/null || break; sleep 1; done
  kill -TERM $pid
  wait $pid
  echo "after $seconds s and TERM: exit code $?"
done
cp $run/metrics.jsonl "$out/tiny_metrics.jsonl"
cp $run/recipe.yaml $run/versions.json "$out/" 2>/dev/null
ls $run $run/checkpoints
tail -n 3 $run/metrics.jsonl
