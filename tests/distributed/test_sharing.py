"""Ranks that hold the same tensors of a checkpoint share the work."""

from __future__ import annotations

import json
import os
from pathlib import Path

from test_resume import LAYOUTS, data, recipe, run  # noqa: F401  (`data` is a fixture)

from dsv3_train.runtime import distributed
from parity import in_processes


def test_data_parallel_ranks_share_writing_and_reading(data, tmp_path):  # noqa: F811
    """What they share, of another layout's checkpoint: the same bits, for less than half of the bytes read.

    In DualPipe dense layers and their optimizer states are the same on four ranks here, experts on two.
    """

    def leg(layout: str, per_node: int = 8, **pipeline):
        parallel, one, _ = LAYOUTS[layout]
        return recipe(
            data,
            tmp_path,
            model={"vocab_size": 512, "hidden_size": 256},
            parallel={**parallel, "zero1": True, "gpus_per_node": per_node},
            pipeline={**one, **pipeline},
            training={"micro_batch_size": 1},
        )

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    def on_rank() -> None:
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        from dsv3_train.checkpoint.load import load_training
        from dsv3_train.checkpoint.state import training_state
        from dsv3_train.optim.gather import fill
        from dsv3_train.training.assemble import assemble

        def load(per_node: int) -> tuple[int, list]:
            settings = leg("pp2_ep2", per_node, schedule="dualpipe")
            trainer = assemble(settings, "cpu")
            whole, before = (trainer.models, trainer.optimizer, None), bytes_read()
            position, guarded, _ = load_training(tmp_path / "checkpoints" / "step_00000003", settings, *whole)
            read = bytes_read() - before
            state = training_state(settings, position, guarded, *whole, loading=False, with_random_state=False)
            tensors = [x for x in nested_values(state) if isinstance(x, ShardedTensor)]
            fill(trainer.optimizer, tensors)
            return read, tensors

        distributed.start(leg("pp2_ep2", schedule="dualpipe"), "cpu")
        (read, expected), (shared, got) = load(4), load(2)
        differing = [x.key for x, y in zip(expected, got, strict=True) if not x.data.equal(y.data)]
        kinds = sum("exp_avg_sq" in x.key for x in got), len(got)
        (tmp_path / os.environ["RANK"]).write_text(json.dumps([read, shared, differing, kinds]))
        distributed.stop()

    run(leg("ep2"), stop_after=3)
    sizes = [file.stat().st_size for file in (tmp_path / "checkpoints" / "step_00000003").glob("*.distcp")]
    assert len(sizes) == 2
    assert max(sizes) < 1.1 * min(sizes)  # and each has written as much
    in_processes(on_rank, 4)
    for rank in "0123":
        read, shared, differing, (moments, all_of) = json.loads((tmp_path / rank).read_text())
        assert differing == []
        assert all_of > moments > 10
        assert shared < read / 2
