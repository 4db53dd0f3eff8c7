"""A run from start to end on one rank: resume, train, validate, log, save."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state

from dsv3_train.checkpoint.directory import complete, resolve
from dsv3_train.checkpoint.load import load_training
from dsv3_train.checkpoint.save import CheckpointWriter
from dsv3_train.checkpoint.state import Position, training_state
from dsv3_train.data import batches as data_batches
from dsv3_train.data import datasets, manifest
from dsv3_train.data.sets import train_sets
from dsv3_train.optim.ema import ParameterEma
from dsv3_train.optim.schedules import Schedules, Values
from dsv3_train.recipe.schema import Recipe
from dsv3_train.training.assemble import assemble
from dsv3_train.training.log import RunLog
from dsv3_train.training.record import StepRecord
from dsv3_train.training.speed import Speed
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


class Run:
    """One rank's share of a training run."""

    def __init__(self, recipe: Recipe, run_dir: Path, device: str, startup: Startup, notes: Sequence[str] = ()) -> None:
        """Build everything; the process groups are there already. `notes` go into the log. Collective.

        Raises:
            UserError: the data or the checkpoint to resume from is at fault.
        """
        self.recipe, self.run_dir, self.device, self.startup = recipe, run_dir, device, startup
        self.schedules = Schedules(recipe)
        self.leader = torch.distributed.get_rank() == 0
        whole = recipe.batch_multiple
        self.eval_sequences = -(-recipe.training.eval_sequences // whole) * whole
        self.train_data, self.valid_data = datasets.build(
            recipe, run_dir / "cache", self.schedules.total_samples, self.eval_sequences
        )
        startup.mark("datasets")
        self.trainer = assemble(recipe, device)
        self.ema = ParameterEma(self.trainer.models, recipe.optim.ema_decay) if recipe.optim.ema_decay else None
        startup.mark("model and optimizer")
        self.position, resumed = self._resume()
        startup.mark("resume")
        self.log = (
            RunLog(run_dir, recipe, total_steps=self.schedules.total_steps, resumed_step=self.position.step)
            if self.leader
            else None
        )
        for note in [*notes, *resumed]:
            self._event(note)
        self.writer = CheckpointWriter(
            run_dir / "checkpoints",
            recipe.checkpoint.keep_last,
            recipe.checkpoint.asynchronous,
            lambda path: self._event(f"checkpoint {path.name} is complete"),
        )
        self.speed = Speed(recipe, device)
        self.last_validation: float | None = None

    def _event(self, text: str) -> None:
        if self.log:
            self.log.event(text)

    def _resume(self) -> tuple[Position, list[str]]:
        """The newest checkpoint of this run, else the one that the recipe begins from, else the start."""
        found = complete(self.run_dir / "checkpoints")
        path = found[-1] if found else None
        if path is None and self.recipe.checkpoint.load:
            path = resolve(Path(self.recipe.checkpoint.load))
        if path is None:
            return Position(), []
        trainer = self.trainer
        position, notes = load_training(path, self.recipe, trainer.models, trainer.optimizer, self.ema)
        return position, [f"resumed from {path} at step {position.step}", *notes]

    def train(self, stop_after: int | None = None) -> None:
        """To the end of the recipe's duration; or until step `stop_after`, as if interrupted there."""
        try:
            self._train(stop_after)
        finally:
            if self.log:
                self.log.close()

    def _train(self, stop_after: int | None) -> None:
        interval, eval_interval = self.recipe.checkpoint.interval, self.recipe.training.eval_interval
        batches = self._read(self.train_data, self._plan(stop_after))
        plan = self._plan(stop_after)
        last_saved = self.position.step
        planned = next(plan, None)
        if planned is None:
            self._event("nothing left to train: training.duration is reached")
        while planned is not None:
            first_sample, batch_size = planned
            planned = next(plan, None)
            self._step(batches, self.schedules.at(first_sample), batch_size)
            step = self.position.step
            ended = planned is None and stop_after is None
            if eval_interval and (step % eval_interval == 0 or ended):
                self._validate()
            if interval and step % interval == 0:
                self._save()
                last_saved = step
            if ended:
                self._event(self._summary())
        if self.position.step > last_saved:
            self._save()
        self.writer.finish()

    def _summary(self) -> str:
        text = f"done: {self.position.step} steps, {self.position.consumed_tokens:,} tokens, in {self.run_dir}"
        entropies = [found.unigram_entropy for found in map(manifest.load, self._prefixes()) if found]
        if self.last_validation is not None and len(entropies) == 1:
            text += (
                f"\nlast validation loss {self.last_validation:.3f} nats per token; "
                f"unigram entropy of the data {entropies[0]:.3f}"
            )
        return text

    def _prefixes(self) -> list[str]:
        return [dataset.path for dataset in train_sets(self.recipe)]

    def _plan(self, stop_after: int | None) -> Iterator[tuple[int, int]]:
        """First sample and size of each global batch from here on."""
        for step, first_sample, batch_size in self.schedules.plan(self.position.consumed_samples):
            if stop_after is not None and step >= stop_after:
                return
            yield first_sample, batch_size

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
        return ({name: x.to(self.device, non_blocking=True) for name, x in batch.items()} for batch in on_cpu)

    def _step(self, reader: Iterator[Batch] | None, values: Values, batch_size: int) -> None:
        clock = StepClock(self.device)
        count = micro_batches_per_step(self.recipe, batch_size)
        batches = [next(reader) for _ in range(count)] if reader else None
        clock.mark("data")
        losses = forward_backward(self.trainer, values, batches, count)
        clock.mark("forward_backward")
        grad_norm = update(self.trainer, values)
        clock.mark("optimizer")
        if self.ema:
            gather_parameters(self.trainer)
            self.ema.update()
        self.writer.poll()
        position = self.position
        position.step += 1
        position.consumed_samples += batch_size
        position.consumed_tokens += batch_size * self.recipe.training.sequence_length
        heat_map = self.recipe.logging.expert_load_interval
        counts_le, biases_le = self.trainer.load.gather()
        clock.mark("other")
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
        gather_parameters(self.trainer)
        count = micro_batches_per_step(self.recipe, self.eval_sequences)
        reader = self._read(self.valid_data, iter([(0, self.eval_sequences)]))
        loss = evaluate(self.trainer, list(reader) if reader else None, count)
        self.last_validation = loss
        if self.log:
            self.log.validation(self.position.step, self.position.consumed_tokens, loss)

    def _save(self) -> None:
        gather_parameters(self.trainer)
        state = training_state(
            self.recipe,
            self.position,
            self.trainer.models,
            self.trainer.optimizer,
            self.ema,
            loading=False,
            with_random_state=True,
        )
        self.writer.save(state, self.position.step)


class StepClock:
    """Where the time of one step goes, in seconds; waits for the device at each mark."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._start = self._last = time.perf_counter()
        self.phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """What went by since the last mark was `phase`."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.phases[phase] = now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """All of the step so far."""
        return self._last - self._start
