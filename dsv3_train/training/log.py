"""What a run says of itself while it trains: console, log.txt, metrics.jsonl, TensorBoard, pictures. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import asdict
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsv3_train import regular
from dsv3_train.errors import UserError
from dsv3_train.lines import newest_first, newest_step, step_of
from dsv3_train.recipe.schema import Recipe
from dsv3_train.training.record import StepRecord


class _Console(Console):
    """Falls silent where nobody reads any more (`| head`); rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is flushed at the end
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class RunLog:
    """Writes to every place at once; a resumed run's files go on where its checkpoint was."""

    def __init__(self, run_dir: Path, recipe: Recipe, *, total_steps: int, resumed_step: int = 0) -> None:
        self._run_dir = run_dir
        self._interval = recipe.logging.interval
        self._text = _Lines(run_dir / "log.txt")
        self._metrics_path = run_dir / "metrics.jsonl"
        earlier = _kept_of_earlier(self._metrics_path, recipe.checkpoint.interval) if resumed_step == 0 else None
        _drop_after(self._metrics_path, resumed_step)
        self._metrics = _Lines(self._metrics_path)
        self._board = None
        if recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Events after the checkpoint, of an attempt that was cut off, are hidden by `purge_step`.
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)
        self._console = _Console()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bar = self._progress.add_task(
            recipe.name, total=total_steps, completed=resumed_step, loss=float("nan"), speed=0.0
        )
        self._progress.start()
        # The bar hides the cursor; a run that fails must give it back. (`atexit` is not called in forked ranks.)
        Finalize(None, self._progress.stop, exitpriority=0)
        self._peak_is_known = True
        if earlier:
            self._say(earlier)

    def step(self, record: StepRecord) -> None:
        """One training step, to every place."""
        self._write_metrics({"kind": "step", **asdict(record)})
        self._progress.update(self._bar, completed=record.step, loss=record.loss, speed=record.tokens_per_second)
        if record.step % self._interval == 0 or record.step in (1, record.total_steps):
            self._say(_line(record))
        if self._peak_is_known and record.tflops_per_gpu is not None and record.mfu is None:
            self._peak_is_known = False
            self._say("MFU is left out: this GPU's peak is not known (dsv3_train/training/speed.py)")
        for tag, value in _scalars(record).items():
            self._on_board("add_scalar", tag, value, record.step)

    def passed_over(self, step: int, consumed_tokens: int, first_sample: int, batch_size: int) -> None:
        """A global batch that was not trained on."""
        fields = {"kind": "passed over", "step": step, "consumed_tokens": consumed_tokens}
        self._write_metrics({**fields, "first_sample": first_sample, "batch_size": batch_size})
        self._progress.update(self._bar, completed=step)
        self._say(f"step {step}: samples {first_sample}-{first_sample + batch_size - 1} passed over")

    def rewind(self, step: int) -> None:
        """The run went back to `step`."""
        self._metrics.close()
        _drop_after(self._metrics_path, step)
        self._metrics = _Lines(self._metrics_path)
        self._on_board("close")
        if self._board is not None:
            self._board.purge_step = step + 1  # a closed writer opens its next file with it
        self._progress.update(self._bar, completed=step)

    def validation(self, step: int, consumed_tokens: int, loss: float) -> None:
        """A validation: mean main loss in nats per token."""
        self._write_metrics({"kind": "validation", "step": step, "consumed_tokens": consumed_tokens, "loss": loss})
        self._say(f"step {step}: validation loss {loss:.4f}")
        self._on_board("add_scalar", "validation/loss", loss, step)

    def overlap(self, step: int, figures: dict[str, Any]) -> None:
        """What `profiling/live.py` found of a step."""
        self._write_metrics({"kind": "overlap", "step": step, **figures})
        if figures.get("straggler") is not None:
            ratio = figures["slowest_over_median"]
            self._say(f"step {step}: rank {figures['straggler']} computes {ratio:.2f}x as long as the median rank")
        for key in ("bubble_fraction", "slowest_rank", "slowest_over_median", "exposed_comm_ms", "hidden_fraction"):
            if figures.get(key) is not None:
                self._on_board("add_scalar", f"overlap/{key.replace('_', ' ')}", figures[key], step)

    def expert_load(self, step: int, load_le: np.ndarray) -> None:
        """Tokens of one global batch per MoE layer and expert, [layers, experts], as a heat map."""
        from dsv3_train.training import pictures  # matplotlib takes as long to import as all else here

        picture = pictures.expert_load(load_le, step)
        try:
            pictures.save(picture, self._run_dir / "expert_load" / f"step_{step:08d}.png")
        except OSError as error:
            self._say(f"step {step}: no picture of the expert load ({error.strerror})")
        self._on_board("add_figure", "expert load", picture, step)

    def event(self, text: str) -> None:
        """Anything else worth a line: a resume, a fallback, a checkpoint."""
        self._say(text)

    def close(self) -> None:
        """Draw the learning curve and let go of the files."""
        from dsv3_train.training import pictures

        self._progress.stop()
        self._metrics.close()
        try:
            curve = pictures.learning_curve(self._metrics_path)
            if curve is not None:
                pictures.save(curve, self._run_dir / "learning_curve.png")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # a full disk, lines of others
            self._say(f"no learning curve ({error})")
        self._on_board("close")
        self._text.close()

    def _say(self, text: str) -> None:
        self._text.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except OSError:  # a closed pipe or terminal, a full disk: log.txt has it
            self._progress.stop()
            self._console.quiet = True

    def _write_metrics(self, fields: dict) -> None:
        self._metrics.add(json.dumps(_finite(fields), allow_nan=False) + "\n")

    def _on_board(self, method: str, *arguments: Any) -> None:
        """TensorBoard's writer raises, at any later call, what its own thread met: a full disk, as a rule."""
        if self._board is None:
            return
        try:
            getattr(self._board, method)(*arguments)
        except Exception as error:
            self._board = None
            self._say(f"no more TensorBoard events ({error})")


class _Lines:
    """A text file that is appended to; what a full disk does not take is kept until it does."""

    def __init__(self, path: Path) -> None:
        self._file = regular.appended(path)
        self._waiting = b""

    def add(self, text: str) -> None:
        self._waiting += text.encode(errors="backslashreplace")  # bytes of a file's name
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError:
            pass  # the failed checkpoint tells of it; these lines come with the next ones

    def close(self) -> None:
        self.add("")
        self._file.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _kept_of_earlier(path: Path, interval: int) -> str | None:
    """Set a history aside whose checkpoints are gone (deleted, or not mounted): what to say of it, if there is one."""
    last = newest_step(path)
    if not interval or last < interval:
        return None
    aside = path.with_name("metrics.earlier.jsonl")
    os.replace(path, aside)
    return f"no checkpoint is here, and {path.name} came to step {last}: begins anew, that history is {aside.name} now"


def _drop_after(path: Path, step: int) -> None:
    """Lines of steps beyond `step` belong to an attempt that was cut off before its next checkpoint.

    Only they are read: before the line of a step that stays, none of a later step can be.
    """
    if not path.is_file():
        return
    end, kept = None, []
    for at, line in newest_first(path):
        of = step_of(line)
        if line is None or of is None or of > step:
            end = at
        elif line.get("kind") in ("step", "passed over"):
            break
        else:  # figures of a step that are known, and written, some steps after it
            kept.append((at, line))
    if end is None:
        return
    again = [line for at, line in reversed(kept) if at > end]
    try:
        with path.open("r+b") as file:
            file.seek(end)
            file.write("".join(json.dumps(line) + "\n" for line in again).encode())
            file.truncate()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free some space") from None


def _line(r: StepRecord) -> str:
    parts = [f"step {r.step}/{r.total_steps}", f"loss {r.loss:.4f}"]
    if r.mtp_loss is not None:
        parts.append(f"mtp {r.mtp_loss:.4f}")
    if r.balance_loss is not None:
        parts.append(f"balance {r.balance_loss:.3f}")
    parts += [
        f"lr {r.lr:.3g}",
        f"batch {r.batch_size}",
        f"norm {r.grad_norm:.3f}",
        f"tokens {r.consumed_tokens:,}",
        f"{r.step_seconds:.2f} s",
        f"{r.tokens_per_second:,.0f} tokens/s",
    ]
    if r.tflops_per_gpu is not None:
        parts.append(f"{r.tflops_per_gpu:.0f} TFLOPS")
    if r.mfu is not None:
        parts.append(f"MFU {r.mfu:.1%}")
    if r.memory_gib is not None:
        parts.append(f"{r.memory_gib:.1f} GiB")
    return "  ".join(parts)


def _scalars(r: StepRecord) -> dict[str, float]:
    """TensorBoard tag -> value."""
    named = {
        "loss/main": r.loss,
        "loss/mtp": r.mtp_loss,
        "loss/balance": r.balance_loss,
        "schedule/lr": r.lr,
        "schedule/batch size": r.batch_size,
        "schedule/mtp weight": r.mtp_weight,
        "schedule/bias update speed": r.bias_update_speed,
        "grad norm": r.grad_norm,
        "consumed tokens": r.consumed_tokens,
        "speed/tokens per second": r.tokens_per_second,
        "speed/TFLOPS per GPU": r.tflops_per_gpu,
        "speed/MFU": r.mfu,
        "memory/GiB": r.memory_gib,
    }
    named |= {f"time/{phase}": seconds for phase, seconds in r.breakdown.items()}
    for layer, (load, spread) in enumerate(zip(r.load_max_over_mean, r.bias_spread, strict=True)):
        named[f"expert load max over mean/MoE layer {layer}"] = load
        named[f"routing bias spread/MoE layer {layer}"] = spread
    return {tag: value for tag, value in named.items() if value is not None}
