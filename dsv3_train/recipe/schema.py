"""The recipe: every setting of a run, typed. What a key means stands beside it.

These models check one value at a time; `checks.py` holds what depends on several keys (topology,
divisibility, placement), `load.py` turns YAML into a `Recipe` and errors into lines.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field, PositiveInt, PrivateAttr, field_validator, model_validator

from dsv3_train.recipe.chunks import PAIRING, stage_count
from dsv3_train.recipe.quantity import Extent
from dsv3_train.recipe.section import Section


class RopeScaling(Section):
    """YaRN on the decoupled key (technical report, section 4.3); absent in 4K pre-training."""

    factor: float = Field(ge=1.0)
    """s: context extension factor (40 in the report)."""
    original_max_position_embeddings: PositiveInt = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


class Model(Section):
    """The architecture, under the names of the published `config.json`."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: int = Field(gt=0, le=1000)
    """Transformer layers of the main model, without the MTP modules."""
    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt
    """Width of a dense FFN."""
    moe_intermediate_size: PositiveInt
    """Width of one expert, routed or shared."""
    first_k_dense_replace: int = Field(ge=0)
    """The first layers, whose FFN is dense."""
    n_routed_experts: PositiveInt
    n_shared_experts: int = Field(ge=0)
    num_experts_per_tok: PositiveInt
    n_group: PositiveInt
    """Groups of experts; a token's experts come from `topk_group` of them."""
    topk_group: PositiveInt
    routed_scaling_factor: float = 2.5
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """Of the router: `sigmoid`, selected scores normalised and the choice biased (DeepSeek-V3); or `softmax` over all
    experts without either (DeepSeek-V2-Lite), which converts and generates but does not train here."""
    q_lora_rank: Union[PositiveInt, None]
    """Width of the query latent; null: no query compression (as DeepSeek-V2-Lite)."""
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    num_nextn_predict_layers: int = Field(ge=0, le=100)
    """Multi-Token Prediction depth."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = Field(default=0.006, gt=0)
    rope_theta: float = 10000.0
    rope_scaling: Union[RopeScaling, None] = None
    """null: plain RoPE, as in the report's 4K pre-training."""


class Parallel(Section):
    """How many processes and what each of them holds."""

    world_size: PositiveInt = 1
    """Processes of the run, one per GPU (or CPU process)."""
    gpus_per_node: PositiveInt = 8
    tensor: PositiveInt = 1
    """Tensor parallel size; more than 1 brings sequence parallelism with it."""
    pipeline: int = Field(default=1, gt=0, le=1000)
    context: PositiveInt = 1
    expert: PositiveInt = 1
    """Expert parallel size, taken from the data-parallel ranks."""
    expert_tensor: PositiveInt = 1
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
    communication_sms: int = Field(default=20, ge=0)
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
    weight: float = Field(default=1.0, gt=0)


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
    vocab_size: PositiveInt = 4096
    fim_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of documents rearranged for fill-in-the-middle (PSM); 0.1 in the report, section 4.1."""
    seed: int = 1234
    max_bad: float = Field(default=0.01, ge=0, le=1)
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
    seed: int = 1234
    """Order of documents and samples."""
    workers: int = Field(default=2, ge=0)
    """Processes that read ahead, per rank."""


class Optim(Section):
    """AdamW, as report section 4.2; epsilon is not published."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """0: no clipping."""
    ema_decay: Union[float, None] = Field(default=None, gt=0, lt=1)
    """Decay per step of the moving average of parameters, kept in CPU memory; null: none."""


class Segment(Section):
    """One piece of a schedule: `{linear: [0, 2.2e-4], until: 2000 steps}`; the last one has no `until`."""

    constant: Union[float, None] = None
    linear: Union[tuple[float, float], None] = None
    cosine: Union[tuple[float, float], None] = None
    until: Union[Extent, None] = None
    """Where the piece ends: consumed tokens, or `N steps`."""

    @field_validator("linear", "cosine", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_shape(self) -> Segment:
        if sum(shape is not None for shape in (self.constant, self.linear, self.cosine)) != 1:
            raise ValueError("a piece is one of constant: v, linear: [from, to], cosine: [from, to]")
        return self


def _pieces(value: Any) -> Any:
    return [{"constant": value}] if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Piecewise = Annotated[list[Segment], BeforeValidator(_pieces), Field(min_length=1)]
"""Pieces in order over consumed tokens; a plain number is one constant piece."""


class Schedule(Section):
    """What changes over consumed tokens. One mechanism for all four."""

    lr: Piecewise
    batch_size: Piecewise
    """Sequences per global batch, rounded down to a multiple of micro-batch size x data parallel size (and x pipeline
    size in the interleaved schedule)."""
    mtp_weight: Piecewise = [Segment(constant=0.0)]  # noqa: RUF012  pydantic copies it
    """Weight (lambda) of the Multi-Token Prediction loss."""
    bias_update_speed: Piecewise = [Segment(constant=0.0)]  # noqa: RUF012  pydantic copies it
    """Step (gamma) of each expert's routing bias per global batch."""
    balance_loss: float = Field(default=1e-4, ge=0)
    """Weight (alpha) of the sequence-wise balance loss; constant in the report."""


class Training(Section):
    duration: Extent
    """Length of the run: tokens (14.8T) or `N steps`."""
    sequence_length: PositiveInt
    """Tokens per sequence."""
    micro_batch_size: PositiveInt = 1
    """Sequences per micro-batch."""
    seed: int = 1234
    """Initial weights."""
    recompute: list[Literal["layernorm", "mla_up_proj", "moe_act", "mlp", "moe", "core_attn", "full"]] = Field(
        default_factory=list
    )
    """What the backward pass computes again instead of keeping."""
    eval_interval: int = Field(default=0, ge=0)
    """Steps between validations; 0: none."""
    eval_sequences: PositiveInt = 64
    """Sequences per validation, rounded up to `Recipe.batch_multiple`."""


class Checkpoint(Section):
    interval: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_last: PositiveInt = 2
    asynchronous: bool = True
    """Write while training goes on."""
    load: Union[str, None] = None
    """A checkpoint to begin from when the run directory has none yet; `hf:PATH`: a Hugging Face directory."""
    verify: bool = True
    """Compare every file with its checksum before a resume; a damaged checkpoint is set aside, the one before used."""


class Faults(Section):
    """What a run does when something goes wrong."""

    max_restarts: int = Field(default=3, ge=0)
    """Failures in a row, without a new checkpoint between them, after which a run is not started again."""
    hang_seconds: float = Field(default=600.0, ge=0)
    """Seconds without progress after which a rank is ended, and who keeps the others waiting is named; longer than a
    step, a validation's micro-batch and a checkpoint's copy. 0: no watchdog."""
    preflight: bool = True
    """Look at machines, versions and links before the first step (also `dsv3 preflight`)."""
    join_seconds: float = Field(default=600.0, gt=0)
    """Seconds in which all ranks have to appear; those that do not are named."""
    slow_factor: float = Field(default=1.5, gt=1)
    """A rank or link that takes this many times the median in the pre-flight checks is named."""
    stop_lead_seconds: PositiveInt = 300
    """SLURM sends TERM this long before the time is over: more than a step and a checkpoint."""
    max_unusable: PositiveInt = 10
    """Global batches in a row that are passed over for a NaN or infinite loss or gradient; then the run ends."""
    spike: Union[float, None] = Field(default=None, gt=0)
    """A loss so many robust standard deviations (1.4826 x the median distance from the median) above the median of
    the last `spike_window` steps is a spike: back to the checkpoint before it, and past its samples. null: never."""
    spike_window: int = Field(default=64, ge=8)
    spike_batches: PositiveInt = 1
    """Global batches that are passed over, the last of them the one whose loss was the spike."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Spikes of a run that it rolls back from; later ones are only told."""
    skip_samples: list[Annotated[str, Field(pattern=r"^\d+-\d+$")]] = Field(default_factory=list)
    """Samples to pass over from the start, as `["4096-4351"]`; a global batch that holds any of them is passed over."""
    rerun_interval: int = Field(default=0, ge=0)
    """Steps between computing one step twice and comparing loss and gradients bit by bit; 0: never. On a GPU it needs
    `runtime.deterministic`."""
    compare_interval: int = Field(default=0, ge=0)
    """Steps between comparing the parameters of data-parallel replicas bit by bit; 0: never."""


class Logging(Section):
    interval: PositiveInt = 1
    """Steps between log lines."""
    tensorboard: bool = True
    expert_load_interval: int = Field(default=100, ge=0)
    """Steps between heat maps of the load per layer and expert; 0: none."""
    pipeline_interval: int = Field(default=0, ge=0)
    """Steps between figures of the pipeline: bubble fraction, slowest rank; 0: none."""
    trace_interval: int = Field(default=0, ge=0)
    """Steps between traces of one step on rank 0 (RUN_DIR/profile), which tell how much communication is exposed; 0:
    none. Each costs some seconds."""


class Runtime(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """GPUs run Transformer Engine's layers over NCCL, a CPU local ones over gloo."""
    run_dir: str = "runs/{name}"
    """Where the run keeps everything; `{name}` is the recipe's name, `{{` and `}}` are braces."""
    deterministic: bool = False
    """Only operations that give the same bits every time: the same layout then gives the same run, also across
    restarts. A CPU always does; on GPUs it costs speed."""

    cuda_graph: bool = True
    """On a GPU, record a micro-batch once and replay it, where nothing in it waits for the host or another rank: BF16,
    one stage, all experts on each rank. Other layouts run as without it."""

    @field_validator("run_dir")
    @classmethod
    def _only_name_in_braces(cls, value: str) -> str:
        if not re.fullmatch(r"([^{}]|{{|}}|{name})*", value):
            raise ValueError("only {name}, the recipe's name, may stand in braces; braces themselves are {{ and }}")
        return value


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
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
