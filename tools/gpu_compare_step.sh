#!/bin/bash
# One step of recipes in another checkout and in this one, on one GPU: bash tools/gpu_compare_step.sh OTHER OUT RECIPE [KEY=VALUE ...]
set -u
other=$1 out=$2 recipe=$3
shift 3
here=$PWD
for tree in "$other" "$here"; do
  cd "$tree" || exit 1
  names=$(mktemp -d)
  ln -sfn "$PWD/cli" "$names/dsv3_cli" && ln -sfn "$PWD/recipes" "$names/dsv3_recipes"
  PYTHONPATH=$names:$PWD:$PYTHONPATH timeout 150 python3 "$here/tools/bench_step.py" "$recipe" data.prepare=null \
    'data.train=[{path: unused}]' "$@" --kernels 60 --host 20 >"$out/$recipe-$(basename "$tree").txt" 2>&1
  echo "$tree"
  grep -v -i warn "$out/$recipe-$(basename "$tree").txt" | grep -E "^$recipe|GPU busy|Error"
done
