"""What `dsv3 generate` makes of a checkpoint, beside what tests/test_commands.py has it print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SAVED = """
import os, sys, torch
os.environ.update(RANK="0", WORLD_SIZE="1")
from pathlib import Path
from parity import tiny
from dsv3_train.recipe.load import dump
from dsv3_train.runtime import distributed
distributed.prepare_import("cpu")
from megatron.core import dist_checkpointing
from dsv3_train.checkpoint.state import Guarded, Position, training_state
from dsv3_train.training.assemble import assemble
recipe = tiny(precision={"params": "bf16"})
distributed.start(recipe, "cpu", torch.distributed.HashStore())
trainer = assemble(recipe, "cpu")
for model in trainer.models:
    for router in model.modules():
        if getattr(router, "expert_bias", None) is not None:
            router._maintain_float32_expert_bias()  # as a forward pass does
            router.expert_bias.copy_(15 + 0.001 * torch.arange(router.expert_bias.numel()))
state = training_state(recipe, Position(), Guarded(), trainer.models, trainer.optimizer, None, loading=False,
                       with_random_state=False)
path = Path(sys.argv[1]) / "checkpoints" / "step_00000000"
path.mkdir(parents=True)
dist_checkpointing.save(state, str(path))
(Path(sys.argv[1]) / "recipe.yaml").write_text(dump(recipe))
"""
GENERATED = """
import sys, json, torch
from pathlib import Path
from dsv3_train.generation import command, sample
def seen(model, *arguments, **options):
    kept = {name: bias.float().tolist() for name, bias in model.named_buffers() if name.endswith("expert_bias")}
    print(json.dumps(kept))
    return iter(())
sample.continuation = seen
command.run(Path(sys.argv[1]) / "checkpoints" / "step_00000000", [], command.Request("", [0], 1, 0.0, 1.0, 0, False))
"""


def python(code: str, *arguments: object) -> str:
    path = os.pathsep.join([str(HERE / "distributed"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_routing_biases_of_a_bf16_model_stay_fp32(tmp_path):
    """Steps of 0.001 around 15 are one value in BF16."""
    python(SAVED, tmp_path / "run")
    kept = json.loads(python(GENERATED, tmp_path / "run").splitlines()[0])
    assert len(kept) == 3
    for biases in kept.values():
        assert max(abs(bias - 15 - 0.001 * i) for i, bias in enumerate(biases)) < 1e-5
