# shellcheck shell=bash
# Sourced by the gpu_*.sh beside it: `dsv3` without installing the package.
at=/tmp/dsv3-path
mkdir -p $at && ln -sfn "$PWD/cli" $at/dsv3_cli && ln -sfn "$PWD/recipes" $at/dsv3_recipes
export PYTHONPATH=${PYTHONPATH:-}:$at
dsv3() { python3 -m dsv3_cli.main "$@"; }
