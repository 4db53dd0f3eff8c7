"""The recipe: every setting of a run, typed. What a key means stands beside it.

The architecture, schedules, and what keeps a run going have files of their own beside this one. These models check one
value at a time; `checks.py` holds what depends on several keys (topology, divisibility, placement), `load.py` turns
YAML into a `Recipe` and errors into lines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Union

from pydantic import Field, PrivateAttr

from dsv3_train.recipe import ranges
from dsv3_train.recipe.chunks import PAIRING, stage_count
from dsv3_train.recipe.model_section import Model
from dsv3_train.recipe.operation_sections import Checkpoint, Faults, Logging, Runtime
from dsv3_train.recipe.quantity import Extent
from dsv3_train.recipe.schedule_section import Schedule, Segment
from dsv3_train.recipe.section import Section

__all__ = ["NO_FP8", "Dataset", "Model", "Precision", "Prepare", "Recipe", "Schedule", "Section", "Segment"]


class Parallel(Section):
    """How many processes and what each of them holds."""

    world_size: ranges.Processes = 1
    """Processes of the run, one per GPU (or CPU process)."""
    gpus_per_node: ranges.Processes = 8
    tensor: ranges.Processes = 1
    """Tensor parallel size; more than 1 brings sequence parallelism with it."""
    pipeline: int = Field(default=1, gt=0, le=1000)
    context: ranges.Processes = 1
    expert: ranges.Processes = 1
    """Expert parallel size, taken from the data-parallel ranks."""
    expert_tensor: ranges.Processes = 1
    zero1: bool = True
    """Shard optimizer states over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    """All-gather updated parameters under the next forward pass (needs zero1 and overlap_grad_reduce)."""
    dispatcher: Literal["alltoall", "allgather", "deepep"] = "alltoall"

    @property
    def data(self) -> int:
        """Data parallel size."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Copies of each routed expert (expert data parallel size)."""
        return self.world_size // (self.expert_tensor * self.pipeline * self.expert)


class Pipeline(Section):
    """How layers are placed on stages and in which order micro-batches run."""

    schedule: Literal["1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"] = "1f1b"
    """1f1b and interleaved are Megatron-core's own. zb1p, zbv, dualpipe and dualpipev are lists of operations that
    `dsv3 pipeline` prints, draws and simulates. zbv and dualpipev give a rank two stages, one on each leg of a V;
    dualpipe gives it a second copy of another rank's stage, for micro-batches that go the other way."""
    layout: Union[str, None] = None
    """Stage by stage in Megatron-core's notation: E embedding, t decoder layer, m MTP, L head and loss,
    | between stages, (..)*n and x*n repeat. null: layers spread evenly (needs divisibility)."""
    virtual_stages: int = Field(default=1, gt=0, le=1000)
    """Model chunks per rank (virtual pipeline stages); more than 1 with `interleaved`."""
    defer_weight_gradients: bool = True
    """Compute weight gradients where the schedule says W; false: with the gradients of inputs, as 1f1b does."""
    overlap_pairs: bool = False
    """Run the forward and backward passes that the schedule pairs (dualpipe, dualpipev; where Megatron-core pairs
    them, interleaved and 1f1b without a pipeline) on two streams, so that the dispatch and combine of each hide behind
    the other's computation (needs BF16 and expert parallelism). Other schedules have no pairs."""
    check_messages: bool = False
    """Debugging: send each tensor's place in the schedule before it, and stop on the first that does not match."""
    communication_sms: int = Field(default=20, ge=0, le=1 << 10)
    """SMs for communication kernels that overlap with computation (report, section 3.2.2: 20 of 132): of NCCL under
    `overlap_pairs`, and of DeepEP. 0: as many as they take themselves."""


class Precision(Section):
    params: Literal["bf16", "fp32"] = "bf16"
    """Type of parameters and activations. Master weights and gradient accumulation are FP32 always."""
    fp8: Literal["none", "blockwise", "current", "delayed", "mxfp8", "emulated"] = "none"
    """How linear layers multiply. `blockwise`: E4M3, activations in 1x128 tiles, weights in 128x128 blocks (report,
    section 3.3), by Transformer Engine. `emulated`: the same arithmetic in plain PyTorch on a CPU, slow, with
    `params: fp32` rounded to BF16 where a GPU would. For comparison Transformer Engine's `current` (a scale per
    tensor), `delayed` (the scale of steps before) and `mxfp8` (1x32 tiles; Blackwell and later). Embedding, output
    head, router, norms and attention's core stay out of FP8."""
    power_of_2_scales: bool = True
    """Scales of `blockwise` and `emulated` are powers of 2; false: FP32."""
    fp8_params: bool = False
    """Keep weights in FP8 alone, beside the optimizer's FP32 masters (`blockwise` with zero1)."""
    fp8_dispatch: bool = False
    """Send tokens to experts, and in the backward pass their outputs' gradients, as E4M3 in 1x128 tiles with power-of-2
    scales (report, section 3.3.3). What experts send back stays in BF16."""
    swiglu_input: Literal["full", "fp8"] = "full"
    """How SwiGLU's input waits for the backward pass, which computes its output again in experts (report, section
    3.3.3): `fp8` is E4M3 in 1x128 tiles. Needs `moe_act` in training.recompute."""
    attention_output: Literal["full", "e5m6"] = "full"
    """How the input of the linear layer after attention waits for the backward pass: `e5m6` is 12 bits a value in 1x128
    tiles with power-of-2 scales (report, section 3.3.3)."""
    adam_moments: Literal["bf16", "fp32"] = "bf16"
    """Type of Adam's first and second moment."""


NO_FP8 = (
    "precision.fp8=none",
    "precision.fp8_params=false",
    "precision.fp8_dispatch=false",
    "precision.swiglu_input=full",
    "precision.attention_output=full",
)
"""Overrides after which nothing is in few bits, whatever a recipe says."""


class Dataset(Section):
    path: str
    """Prefix of an indexed dataset (`PATH.bin`, `PATH.idx`), as `dsv3 data prepare` writes it."""
    weight: ranges.DataWeight = 1.0


class Prepare(Section):
    """Data that a run prepares itself when it is not there yet (same settings as `dsv3 data prepare`)."""

    inputs: list[str] = Field(min_length=1)
    """Files, directories or globs; `python-stdlib` is the source of Python's standard library, `python-packages` that
    of the packages installed beside it."""
    output: str
    """Prefix of the indexed dataset to write."""
    tokenizer: Union[str, None] = None
    """A `tokenizer.json`, or the directory that holds it; null: train a byte-level BPE of `vocab_size` tokens on the
    inputs."""
    eos_token: Union[str, None] = None
    """The token of `tokenizer` that ends a document, as it is spelled; null: its configuration's."""
    vocab_size: ranges.Vocabulary = 4096
    fim_rate: ranges.Share = 0.0
    """Share of documents rearranged for fill-in-the-middle (PSM); 0.1 in the report, section 4.1."""
    seed: ranges.Seed = 1234
    max_bad: ranges.Share = 0.01
    """Share of documents (and of files to their end) that may be unreadable; with more, nothing is written."""


class Data(Section):
    train: list[Dataset] = Field(default_factory=list)
    valid: list[Dataset] = Field(default_factory=list)
    """Empty: the last `valid_fraction` of each training dataset's documents."""
    valid_fraction: float = Field(default=0.01, ge=0, lt=1)
    tokenizer: Union[str, None] = None
    """A `tokenizer.json`, or the directory that holds it; null: PREFIX.tokenizer.json of the first training dataset."""
    eos_token: Union[str, None] = None
    """The token that ends a document, as it is spelled; null: the configuration's beside the tokenizer."""
    prepare: Union[Prepare, None] = None
    seed: ranges.DataSeed = 1234
    """Order of documents and samples."""
    workers: int = Field(default=2, ge=0, le=1 << 10)
    """Processes that read ahead, per rank."""


class Optim(Section):
    """AdamW, as report section 4.2; epsilon is not published."""

    beta1: ranges.Decay = 0.9
    beta2: ranges.Decay = 0.95
    eps: ranges.AdamEpsilon = 1e-8
    weight_decay: ranges.WeightDecay = 0.1
    clip_grad_norm: ranges.ClipNorm = 1.0
    """0: no clipping."""
    ema_decay: Union[float, None] = Field(default=None, gt=0, le=0.999999)
    """Decay per step of the moving average of parameters, kept in CPU memory; null: none."""


class Training(Section):
    duration: Extent
    """Length of the run: tokens (14.8T) or `N steps`."""
    sequence_length: ranges.Positions
    """Tokens per sequence."""
    micro_batch_size: ranges.Sequences = 1
    """Sequences per micro-batch."""
    seed: ranges.Seed = 1234
    """Initial weights."""
    recompute: list[Literal["layernorm", "mla_up_proj", "moe_act", "mlp", "moe", "core_attn", "full"]] = Field(
        default_factory=list
    )
    """What the backward pass computes again instead of keeping."""
    eval_interval: ranges.Times = 0
    """Steps between validations; 0: none."""
    eval_sequences: ranges.Sequences = 64
    """Sequences per validation, rounded up to `Recipe.batch_multiple`."""


class Recipe(Section):
    name: str = Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: Model
    parallel: Parallel = Parallel()
    pipeline: Pipeline = Pipeline()
    precision: Precision = Precision()
    data: Data = Data()
    optim: Optim = Optim()
    schedule: Schedule
    training: Training
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    logging: Logging = Logging()
    runtime: Runtime = Runtime()
    _private: bool = PrivateAttr(False)

    @property
    def file_mode(self) -> int:
        """Of files that hold the resolved recipe: 0600 where a value came from the environment, or from a file that
        others may not read."""
        return 0o600 if self._private else 0o666

    @property
    def run_dir(self) -> Path:
        """What a run leaves behind goes there."""
        return Path(self.runtime.run_dir.format(name=self.name))

    @property
    def overlaps_pairs(self) -> bool:
        """Whether forward and backward passes overlap: the schedule pairs them, and the recipe wants it."""
        alone = self.pipeline.schedule == "1f1b" and self.parallel.pipeline == 1
        return self.pipeline.overlap_pairs and (alone or self.pipeline.schedule in PAIRING)

    @property
    def stage_count(self) -> int:
        """Stages that the model is cut into, of all ranks."""
        return stage_count(self.pipeline.schedule, self.parallel.pipeline, self.pipeline.virtual_stages)

    @property
    def batch_multiple(self) -> int:
        """Sequences that every global batch is a multiple of: one micro-batch per data-parallel rank, or, in the
        interleaved schedule, which needs whole groups, one per stage of each.
        """
        group = self.parallel.pipeline if self.pipeline.schedule == "interleaved" else 1
        return self.training.micro_batch_size * self.parallel.data * group
