"""One stage of the model, wherever in the pipeline a schedule puts it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_train.recipe.chunks import MIRRORED, V_SHAPED, chunks_of
from dsv3_train.recipe.schema import Recipe


class MirroredGroup:
    """A pipeline group seen from its other end: what Megatron-core asks of one while it builds and runs a stage."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def rank(self) -> int:
        """P-1-r for rank r."""
        return self.group.size() - 1 - self.group.rank()

    def size(self) -> int:
        """P."""
        return self.group.size()


@dataclass(frozen=True)
class Place:
    """Where a model chunk stands."""

    direction: int
    stage: int
    stages: int
    """Of its direction."""
    virtual: int | None
    """Megatron-core's virtual stage; None where a rank has one for each direction."""
    mirrored: bool
    """The chunk is what Megatron-core would build on the rank opposite."""
    replica: bool
    """A second copy of a stage whose first is on the rank opposite (dualpipe's ranks of the second half)."""

    @property
    def first(self) -> bool:
        """It embeds."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """It computes the loss."""
        return self.stage == self.stages - 1

    @contextlib.contextmanager
    def view(self) -> Iterator[None]:
        """Let Megatron-core's global state give the pipeline rank that it builds this chunk for."""
        if not self.mirrored:
            yield
            return
        group = MirroredGroup(parallel_state.get_pipeline_model_parallel_group())
        parallel_state.set_pipeline_model_parallel_rank(group.rank())
        try:
            yield
        finally:
            parallel_state.set_pipeline_model_parallel_rank(None)

    def groups(self) -> ProcessGroupCollection:
        """The process groups to build with."""
        groups = ProcessGroupCollection.use_mpu_process_groups()
        if self.mirrored:
            groups = copy.copy(groups)
            groups.pp = MirroredGroup(groups.pp)
        return groups


def places(recipe: Recipe) -> list[Place]:
    """The chunks of this pipeline rank, by stage. Needs Megatron's process groups."""
    kind, ranks = recipe.pipeline.schedule, recipe.parallel.pipeline
    rank = parallel_state.get_pipeline_model_parallel_rank()
    virtual = kind == "interleaved" or kind in V_SHAPED
    return [
        Place(
            direction=direction,
            stage=stage,
            stages=recipe.stage_count,
            virtual=stage // ranks if virtual else None,
            mirrored=kind in MIRRORED and stage != rank,
            replica=kind == "dualpipe" and rank >= ranks // 2,
        )
        for direction, stage in chunks_of(kind, ranks, rank, recipe.pipeline.virtual_stages)
    ]


class Stage(GPTModel):
    """Megatron-core's GPTModel of one stage, at a place."""

    mtp_process: bool

    def __init__(self, *args: Any, place: Place, **kwargs: Any) -> None:
        self.place = place
        super().__init__(
            *args,
            pre_process=place.first,
            post_process=place.last,
            vp_stage=place.virtual,
            pg_collection=place.groups(),
            **kwargs,
        )

    def share_embedding(self, first: GPTModel) -> None:
        """Let MTP embed with the embedding of the stage that this rank holds too (report, section 3.2.3).

        It is not registered here, so that it has one gradient buffer and one place in a checkpoint.
        """
        del self._modules["embedding"]
        self.__dict__["embedding"] = first.embedding

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """As Megatron-core's: cross entropy in FP32, labels [b, s] and logits [s, b, vocabulary] -> [b, s].

        On a GPU our own kernel. Transformer Engine's keeps the logits' gradient in their memory as the probability
        rounded, minus 1 for the label: in BF16 that is 2% off where the probability is 0.95, and 0 where it is 0.9985
        or more (tests/gpu/test_te.py). So it needs a copy of the logits in FP32, 2.1 GB for 4096 tokens of the
        report's vocabulary.
        """
        if not logits.is_cuda:
            return super().compute_language_model_loss(labels, logits)
        from dsv3_train.kernels.cross_entropy import cross_entropy  # Triton is not everywhere

        return cross_entropy(logits, labels, self.pg_collection.tp)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As Megatron-core's; a replica's tensors are marked as such, and a shared embedding is its owner's to give."""
        shared = "embedding" in self.__dict__
        mtp: bool = self.mtp_process
        self.mtp_process = mtp and not shared
        try:
            with self.place.view():
                state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self.mtp_process = mtp
        if self.place.replica:
            for entry in nested_values(state):
                first, *others = entry.replica_id
                entry.replica_id = (first + 1, *others)
        return state
