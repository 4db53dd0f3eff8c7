"""A run from start to end on one rank: resume, train, validate, log, save."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state

from dsv3_train.checkpoint.directory import discard_after
from dsv3_train.checkpoint.load import newest
from dsv3_train.checkpoint.save import CheckpointWriter
from dsv3_train.checkpoint.state import training_state
from dsv3_train.data import batches as data_batches
from dsv3_train.data.locate import outside as outside_told
from dsv3_train.errors import UserError
from dsv3_train.optim.ema import ParameterEma
from dsv3_train.optim.gather import fill
from dsv3_train.optim.schedules import Schedules, Values
from dsv3_train.profiling.live import Watch
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import heartbeat, incidents
from dsv3_train.runtime.exits import PREEMPTED
from dsv3_train.runtime.signals import StopRequest
from dsv3_train.training import cuda_graph, data_identity, indices
from dsv3_train.training.assemble import assemble
from dsv3_train.training.guard import Guard, Verdict
from dsv3_train.training.log import RunLog
from dsv3_train.training.losses import Losses
from dsv3_train.training.record import StepRecord
from dsv3_train.training.resume import Resume, tokenizer_of
from dsv3_train.training.speed import Speed, StepClock
from dsv3_train.training.startup import Startup
from dsv3_train.training.step import (
    Batch,
    evaluate,
    forward_backward,
    gather_parameters,
    micro_batches_per_step,
    needs_data,
    update,
)
from dsv3_train.training.summary import summary

_WAITS = (1, 10, 30)
"""Seconds before each further attempt at a run's last checkpoint."""


class Run:
    """One rank's share of a training run."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        device: str,
        startup: Startup,
        notes: Sequence[str] = (),
        stop: StopRequest | None = None,
    ) -> None:
        """Build everything; the process groups are there already. `notes` go into the log. Collective.

        Args:
            stop: whether this process is asked to stop; None: nobody asks.

        Raises:
            UserError: the data or the checkpoint to resume from is at fault.
        """
        self.recipe, self.run_dir, self.device, self.startup = recipe, run_dir, device, startup
        self.schedules = Schedules(recipe)
        self.leader = torch.distributed.get_rank() == 0
        self.log: RunLog | None = None
        self._outside: list[int] = []
        """Samples of the micro-batch just read that hold a token outside the vocabulary."""
        self.eval_sequences = indices.eval_sequences(recipe)
        self.train_data, self.valid_data = indices.of_run(recipe, run_dir)
        self.trained_on = data_identity.of_run(recipe, run_dir)
        startup.mark("datasets")
        self.trainer = assemble(recipe, device)
        self.ema = ParameterEma(self.trainer.models, recipe.optim.ema_decay) if recipe.optim.ema_decay else None
        startup.mark("model and optimizer")
        self.guard = Guard(recipe, run_dir, self.trainer, stop, self._incident)
        self.tokenizer = tokenizer_of(run_dir, recipe)
        self.resume = Resume(recipe, run_dir, self.trainer, self.ema, self.guard, self.tokenizer)
        said: list[str] = []
        self.position = self.resume.find(said.append)
        self._plan_from_here(said.append)
        startup.mark("resume")
        if self.leader:
            self.log = RunLog(run_dir, recipe, total_steps=self.schedules.total_steps, resumed_step=self.position.step)
        without = cuda_graph.why_not(recipe, device, self.trainer.models)
        if device == "cuda":
            said.append(f"no CUDA graph: {without}" if without else "each micro-batch is a CUDA graph from step 2 on")
        for note in [*notes, *said]:
            self._event(note)
        self.writer = CheckpointWriter(
            run_dir / "checkpoints",
            recipe.checkpoint.keep_last,
            recipe.checkpoint.asynchronous,
            self._checkpoint_complete,
            lambda step, reason: self._incident(
                "checkpoint", f"the checkpoint of step {step} failed, and training goes on: {reason}"
            ),
        )
        self.speed = Speed(recipe, device)
        self.watch = Watch(recipe, run_dir, self.trainer)
        self.last_validation: float | None = None
        # What lives as long as the run need not be searched at every collection: Megatron-core collects at every save.
        gc.collect()
        gc.freeze()

    def _event(self, text: str) -> None:
        if self.log:
            self.log.event(text)

    def _checkpoint_complete(self, path: Path, stood_still: float) -> None:
        self._event(f"checkpoint {path.name} is complete; training stood still for {stood_still:.2f} s")

    def _incident(self, kind: str, text: str) -> None:
        """Something went wrong, and the run goes on: into the log and the record of incidents."""
        self._event(text)
        if self.leader:
            incidents.record(self.run_dir, kind, text=text, step=self.position.step)

    def _plan_from_here(self, told: Callable[[str], None]) -> None:
        """Where another layout or recipe has brought the run off this one's plan: say so, and have samples enough."""
        step, samples = self.position.step, self.position.consumed_samples
        planned = self.schedules.step_of(samples)
        if planned == step:
            return
        told(
            f"this recipe's batches would have taken {planned} steps to {samples:,} samples; steps count on from "
            f"{step}, and what is scheduled by steps follows them"
        )
        *_, end = [samples, *(first + size for _, first, size in self.schedules.plan(samples, step))]
        if end > self.schedules.enough_samples:
            self.train_data, _ = indices.of_run(self.recipe, self.run_dir, end)

    def train(self, stop_after: int | None = None) -> None:
        """To the end of the recipe's duration; or until step `stop_after`, as if interrupted there.

        Raises:
            SystemExit: asked to stop (`PREEMPTED`, with a checkpoint; 1 without); or results are corrupt (`CORRUPT`).
            UserError: too many global batches in a row gave no finite loss, or the last checkpoint cannot be written.
        """
        try:
            self._train(stop_after)
        finally:
            if self.log:
                self.log.close()

    def _train(self, stop_after: int | None) -> None:
        interval, eval_interval = self.recipe.checkpoint.interval, self.recipe.training.eval_interval
        last_saved = self.position.step
        plan = self._plan(stop_after)
        batches = self._read(self.train_data, self._wanted(stop_after))
        planned = next(plan, None)
        if planned is None:
            self._event("nothing left to train: training.duration is reached")
        while planned is not None:
            first_sample, batch_size = planned
            verdict = self._step(batches, first_sample, batch_size)
            if verdict is Verdict.ROLL_BACK:
                self._roll_back(first_sample, batch_size)
                last_saved = self.position.step
                plan = self._plan(stop_after)
                batches = self._read(self.train_data, self._wanted(stop_after))
                planned = next(plan, None)
                continue
            planned = next(plan, None)
            step = self.position.step
            ended = planned is None and stop_after is None
            if eval_interval and (step % eval_interval == 0 or ended):
                self._validate()
            if (interval and step % interval == 0) or verdict is Verdict.STOP:
                self._save()
                last_saved = step
            if verdict is Verdict.STOP and not ended:
                asked = f"asked to stop ({self.guard.asked}): "
                if not self._saved(again_after=(0,)):
                    self._event(f"{asked}step {step} could not be saved; start again to go on from the one before")
                    raise SystemExit(1)  # started again like any failure, as often as that is allowed
                self._event(f"{asked}saved at step {step}; start again to go on")
                raise SystemExit(PREEMPTED)
            if ended:
                self._event(summary(self.recipe, self.run_dir, self.position, self.last_validation))
        if self.position.step > last_saved:
            self._save()
        if not self._saved(again_after=_WAITS):
            raise UserError(
                f"{self.run_dir}/checkpoints: the run is at its end, and its last checkpoint could not be written (see "
                "log.txt); make room, or mend the file system, and start again to go on from the one before"
            )

    def _saved(self, again_after: Sequence[int]) -> bool:
        """Wait for the last checkpoint to be whole; one that failed is tried again, after so many seconds each."""
        whole = self.writer.finish()
        for seconds in () if whole else again_after:
            heartbeat.mark("waiting to save again")
            time.sleep(seconds)
            self._save()
            if whole := self.writer.finish():
                break
        return whole

    def _roll_back(self, first_sample: int, batch_size: int) -> None:
        """After a spike: to the newest checkpoint before the samples that are passed over from now on. Collective."""
        step = self.position.step + 1
        self.writer.finish()
        root, skip = self.run_dir / "checkpoints", self.guard.spike(first_sample, batch_size, step)
        said: list[str] = []
        path = newest(
            root, self.recipe.checkpoint.verify, functools.partial(self.guard.skips.against, another=skip), said.append
        )
        if path is None:  # none is old enough, so past this batch alone, before its update
            skip = self.guard.spike(first_sample, batch_size, step, batches=1)
        self.guard.skips.add(skip, write=self.leader)
        if path is not None:
            self.position, notes = self.resume.load(path)
            said += notes
            if self.leader:
                discard_after(root, self.position.step)
            torch.distributed.barrier()
        if self.log:
            self.log.rewind(self.position.step)
        self._incident(
            "spike",
            f"step {step}: loss {skip.loss:.4f} is a spike; samples {skip.first}-{skip.last} are passed over "
            f"from now on ({self.guard.skips.rollbacks()} of {self.recipe.faults.max_rollbacks})",
        )
        for line in said:
            self._event(line)

    def _plan(self, stop_after: int | None) -> Iterator[tuple[int, int]]:
        """First sample and size of each global batch from here on."""
        position = self.position
        for step, first_sample, batch_size in self.schedules.plan(position.consumed_samples, position.step):
            if stop_after is not None and step >= stop_after:
                return
            yield first_sample, batch_size

    def _wanted(self, stop_after: int | None) -> Iterator[tuple[int, int]]:
        """`_plan` without what is passed over."""
        return (planned for planned in self._plan(stop_after) if not self.guard.skips.covers(*planned))

    def _read(self, dataset: torch.utils.data.Dataset, plan: Iterator[tuple[int, int]]) -> Iterator[Batch] | None:
        """This rank's micro-batches in order, on its device; None where no stage needs any."""
        if not needs_data(self.trainer):
            return None
        on_cpu = data_batches.micro_batches(
            dataset,
            plan,
            self.recipe.training.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            workers=self.recipe.data.workers,
            pin_memory=self.device == "cuda",
        )
        on_cpu = data_batches.within(self.recipe.model.vocab_size, on_cpu, self._outside.append)
        return ({name: x.to(self.device, non_blocking=True) for name, x in batch.items()} for batch in on_cpu)

    def _step(self, reader: Iterator[Batch] | None, first_sample: int, batch_size: int) -> Verdict:
        """One global batch, unless it is to be passed over."""
        number = self.position.step + 1
        heartbeat.mark("data", number)
        if self.guard.skips.covers(first_sample, batch_size):
            return self._pass_over(first_sample, batch_size, self.guard.stop())
        clock = StepClock(self.device)
        values = self.schedules.at(first_sample, self.position.step)
        count = micro_batches_per_step(self.recipe, batch_size)
        batches, outside = self._draw(reader, count, first_sample)
        clock.mark("data")
        heartbeat.mark("forward and backward")
        compute = self.watch.watched(functools.partial(forward_backward, self.trainer, values, batches, count), number)
        told = functools.partial(outside_told, self.train_data, vocab_size=self.recipe.model.vocab_size)
        losses, verdict = self.guard.gradients(compute, number, first_sample, batch_size, outside, told)
        clock.mark("forward_backward")
        if verdict is Verdict.ROLL_BACK:
            return verdict
        if verdict in (Verdict.PASS_OVER, Verdict.PASS_OVER_AND_STOP):
            self.writer.poll()
            return self._pass_over(first_sample, batch_size, verdict is Verdict.PASS_OVER_AND_STOP)
        heartbeat.mark("optimizer")
        grad_norm = update(self.trainer, values)
        clock.mark("optimizer")
        heartbeat.mark("bookkeeping")
        if self.ema:
            gather_parameters(self.trainer)
            self.ema.update()
        self.writer.poll()
        self.position.advance(batch_size, self.recipe.training.sequence_length)
        counts_le, biases_le = self.trainer.load.gather()
        overlap = self.watch.figures(number)
        clock.mark("other")
        self._log_step(values, batch_size, losses, grad_norm, clock, counts_le, biases_le)
        if overlap and self.log:
            self.log.overlap(number, overlap)
        return verdict

    def _draw(
        self, reader: Iterator[Batch] | None, count: int, first_sample: int
    ) -> tuple[list[Batch] | None, int | None]:
        """So many micro-batches, and the first of their samples that holds a token outside the vocabulary."""
        if reader is None:
            return None, None
        size, batches, samples = self.recipe.training.micro_batch_size, [], []
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        for number in range(count):
            self._outside.clear()
            batches.append(next(reader))
            samples += [first_sample + (number * ranks + rank) * size + row for row in self._outside]
        return batches, min(samples, default=None)

    def _pass_over(self, first_sample: int, batch_size: int, stop: bool) -> Verdict:
        """Count a global batch as consumed without training on it."""
        self.position.advance(batch_size, self.recipe.training.sequence_length)
        if self.log:
            self.log.passed_over(self.position.step, self.position.consumed_tokens, first_sample, batch_size)
        return Verdict.STOP if stop else Verdict.GO_ON

    def _log_step(
        self,
        values: Values,
        batch_size: int,
        losses: Losses,
        grad_norm: float,
        clock: StepClock,
        counts_le: torch.Tensor,
        biases_le: torch.Tensor,
    ) -> None:
        position, heat_map = self.position, self.recipe.logging.expert_load_interval
        if self.log is None:
            return
        tokens_per_second = batch_size * self.recipe.training.sequence_length / clock.seconds
        self.log.step(
            StepRecord(
                step=position.step,
                total_steps=self.schedules.total_steps,
                consumed_samples=position.consumed_samples,
                consumed_tokens=position.consumed_tokens,
                loss=losses.loss,
                mtp_loss=losses.mtp,
                balance_loss=losses.balance,
                lr=values.lr,
                batch_size=batch_size,
                mtp_weight=values.mtp_weight,
                bias_update_speed=values.bias_update_speed,
                grad_norm=grad_norm,
                step_seconds=clock.seconds,
                breakdown=clock.phases,
                tokens_per_second=tokens_per_second,
                load_max_over_mean=(counts_le.max(dim=1).values / counts_le.mean(dim=1)).tolist(),
                bias_spread=(biases_le.max(dim=1).values - biases_le.min(dim=1).values).tolist(),
                **self.speed.of(tokens_per_second),
            )
        )
        if heat_map and position.step % heat_map == 0:
            self.log.expert_load(position.step, counts_le.numpy())
        if len(self.startup.phases) and "first step" not in self.startup.phases:
            self.startup.mark("first step")
            self._event(str(self.startup))

    def _validate(self) -> None:
        if self.valid_data is None:
            return
        heartbeat.mark("validation")
        gather_parameters(self.trainer)
        count = micro_batches_per_step(self.recipe, self.eval_sequences)
        reader = self._read(self.valid_data, iter([(0, self.eval_sequences)]))
        batches, outside = self._draw(reader, count, 0)
        if (first := self.guard.first_outside(outside)) is not None:
            told = outside_told(self.valid_data, first, self.recipe.model.vocab_size)
            self._incident("token", f"no validation at step {self.position.step}: {told}, in the validation data")
            return
        self.last_validation = loss = evaluate(self.trainer, batches, count)
        if self.log:
            self.log.validation(self.position.step, self.position.consumed_tokens, loss)

    def _save(self) -> None:
        heartbeat.mark("checkpoint")
        gather_parameters(self.trainer)
        state = functools.partial(
            training_state,
            self.recipe,
            self.position,
            self.guard.kept(self.position.consumed_samples),
            self.trainer.models,
            self.trainer.optimizer,
            self.ema,
            loading=False,
            with_random_state=True,
            tokenizer=self.tokenizer,
            data=self.trained_on,
        )
        self.writer.save(state, self.position.step, functools.partial(fill, self.trainer.optimizer))
