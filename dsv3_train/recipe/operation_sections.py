"""The recipe's sections on how a run is kept going and what it leaves: checkpoint, faults, logging, runtime."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Union

from pydantic import Field, field_validator

from dsv3_train.recipe import ranges
from dsv3_train.recipe.section import Section


class Checkpoint(Section):
    interval: ranges.Times = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_last: ranges.Some = 2
    asynchronous: bool = True
    """Write while training goes on."""
    load: Union[str, None] = None
    """A checkpoint to begin from when the run directory has none yet; `hf:PATH`: a Hugging Face directory."""
    verify: bool = True
    """Compare every file with its checksum before a resume; a damaged checkpoint is set aside, the one before used."""


class Faults(Section):
    """What a run does when something goes wrong."""

    max_restarts: ranges.Times = 3
    """Failures in a row, without a new checkpoint between them, after which a run is not started again."""
    hang_seconds: ranges.Seconds = 600.0
    """Seconds without progress after which a rank is ended, and who keeps the others waiting is named; longer than a
    step, a validation's micro-batch and a checkpoint's copy. 0: no watchdog."""
    preflight: bool = True
    """Look at machines, versions and links before the first step (also `dsv3 preflight`)."""
    join_seconds: float = Field(default=600.0, gt=0, le=1e7)
    """Seconds in which all ranks have to appear; those that do not are named."""
    slow_factor: float = Field(default=1.5, gt=1, le=1e6)
    """A rank or link that takes this many times the median in the pre-flight checks is named."""
    stop_lead_seconds: int = Field(default=300, gt=0, le=10**7)
    """SLURM sends TERM this long before the time is over: more than a step and a checkpoint."""
    max_unusable: ranges.Some = 10
    """Global batches in a row that are passed over for a NaN or infinite loss or gradient; then the run ends."""
    spike: Union[ranges.StandardDeviations, None] = None
    """A loss so many robust standard deviations (1.4826 x the median distance from the median) above the median of
    the last `spike_window` steps is a spike: back to the checkpoint before it, and past its samples. null: never."""
    spike_window: int = Field(default=64, ge=8, le=10**6)
    spike_batches: ranges.Some = 1
    """Global batches that are passed over, the last of them the one whose loss was the spike."""
    max_rollbacks: ranges.Times = 3
    """Spikes of a run that it rolls back from; later ones are only told."""
    skip_samples: list[Annotated[str, Field(pattern=r"^[0-9]{1,18}-[0-9]{1,18}$")]] = Field(default_factory=list)
    """Samples to pass over from the start, as `["4096-4351"]`; a global batch that holds any of them is passed over."""
    rerun_interval: ranges.Times = 0
    """Steps between computing one step twice and comparing loss and gradients bit by bit; 0: never. On a GPU it needs
    `runtime.deterministic`."""
    compare_interval: ranges.Times = 0
    """Steps between comparing the parameters of data-parallel replicas bit by bit; 0: never."""


class Logging(Section):
    interval: ranges.Some = 1
    """Steps between log lines."""
    tensorboard: bool = True
    expert_load_interval: ranges.Times = 100
    """Steps between heat maps of the load per layer and expert; 0: none."""
    pipeline_interval: ranges.Times = 0
    """Steps between figures of the pipeline: bubble fraction, slowest rank; 0: none."""
    trace_interval: ranges.Times = 0
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
