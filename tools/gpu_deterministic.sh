#!/bin/bash
# Twice the same run and once a stopped and resumed one on a GPU, all with runtime.deterministic: the same bits?
# bash tools/gpu_deterministic.sh DATA_PREFIX
set -u
. tools/on_gpu.sh
train() {
  dsv3 train dsv3_tiny runtime.deterministic=true runtime.run_dir="/tmp/same-$1" \
    data.prepare.output="$data" training.duration="12 steps" training.eval_interval=0 schedule.batch_size=16 \
    checkpoint.interval=6 >"/tmp/same-$1.log" 2>&1 || tail -n 3 "/tmp/same-$1.log"
}
data=$1
train a
train b
cp /tmp/same-b/metrics.jsonl /tmp/same-b.jsonl
rm -rf /tmp/same-b/checkpoints/*12* # as if it had been killed after step 6
train b
python3 - <<'PY'
import json

def rows(path):
    found = {}
    for line in open(path):
        row = json.loads(line)
        if row.get("kind") == "step":
            found[row["step"]] = (row["loss"], row["mtp_loss"], row["grad_norm"])
    return found

first, second, resumed = (rows(f"/tmp/same-{name}") for name in ("a/metrics.jsonl", "b.jsonl", "b/metrics.jsonl"))
print("12 steps, loss, MTP loss and gradient norm: again equal", first == second, "resumed equal", first == resumed)
print({step: first[step] for step in (1, 12)}, {step: resumed[step] for step in (12,)})
PY
