"""Where a run begins: at its newest whole checkpoint, at one that the recipe names, from published weights, or anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from dsv3_train.checkpoint import tokenizer_home
from dsv3_train.checkpoint.directory import complete, resolve
from dsv3_train.checkpoint.hf.fill import carry, load_published
from dsv3_train.checkpoint.hf.origin import PREFIX
from dsv3_train.checkpoint.load import (
    begin_from_weights,
    load_training,
    newest,
    refuse_damaged,
    refuse_rounded_masters,
    trained_on,
)
from dsv3_train.checkpoint.state import Position
from dsv3_train.errors import UserError
from dsv3_train.optim.ema import ParameterEma
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime.exchange import exchange
from dsv3_train.training import data_identity
from dsv3_train.training.guard import Guard
from dsv3_train.training.step import Trainer


def tokenizer_of(run_dir: Path, recipe: Recipe) -> str | None:
    """sha256 of the run's tokenizer.json, by rank 0; None: not known. Collective."""
    home = tokenizer_home.find(run_dir, recipe) if torch.distributed.get_rank() == 0 else None
    (found,) = exchange(Optional[str], home.sha256 if home else None, source=0)
    return found


@dataclass(frozen=True)
class Resume:
    """Fills one rank's model, optimizer, average and guard with what a checkpoint holds of them."""

    recipe: Recipe
    run_dir: Path
    trainer: Trainer
    ema: ParameterEma | None
    guard: Guard
    tokenizer: str | None = None
    """sha256 of the run's tokenizer.json; None: not known."""

    def find(self, told: Callable[[str], None]) -> Position:
        """Load what the run begins with. Collective.

        Args:
            told: takes each line about it.

        Raises:
            UserError: a checkpoint is damaged or of another training.
        """
        path = newest(self.run_dir / "checkpoints", self.recipe.checkpoint.verify, self.guard.skips.against, told)
        if path is None and complete(self.run_dir / "checkpoints"):
            raise UserError(
                f"{self.run_dir}: every checkpoint was trained on samples that {self.guard.skips.path} passes over; "
                "take their lines out of it to go on nevertheless"
            )
        begin = self.recipe.checkpoint.load
        if path is None and begin and begin.startswith(PREFIX):
            for note in self._published(Path(begin.removeprefix(PREFIX))):
                told(note)
            return Position()
        begun = path is None and begin is not None
        if path is None and begin:
            path = self._resolved(Path(begin))
            if self.recipe.checkpoint.verify:
                refuse_damaged(path)
        if path is None:
            return Position()
        position, notes = self.load(path)
        for note in notes:
            told(note)
        if begun:
            carry(path, self.run_dir)
        return position

    @staticmethod
    def _resolved(path: Path) -> Path:
        """The checkpoint that `path` means to rank 0: a run that still saves there shows others another."""
        found, refused = "", ""
        if torch.distributed.get_rank() == 0:
            try:
                found = str(resolve(path))
            except UserError as error:
                refused = str(error)
        ((found, refused),) = exchange(tuple[str, str], (found, refused), source=0)
        if refused:
            raise UserError(refused)
        return Path(found)

    def load(self, path: Path) -> tuple[Position, list[str]]:
        """Be where a checkpoint is; what to say of it. Collective.

        Raises:
            UserError: damaged, or of another training.
        """
        trainer, length = self.trainer, self.recipe.training.sequence_length
        position, guarded, notes = load_training(
            path, self.recipe, trainer.models, trainer.optimizer, self.ema, self.tokenizer
        )
        samples, tokens = position.consumed_samples, position.consumed_tokens
        if tokens != samples * length:
            raise UserError(
                f"{path}: trained on {samples:,} sequences of {tokens:,} tokens; of another length, samples and "
                f"schedules would be counted otherwise; set training.sequence_length={tokens // max(samples, 1)}, "
                f"not {length}"
            )
        self.guard.restore(guarded)
        if torch.distributed.get_rank() == 0:  # whose log has the notes
            notes += data_identity.unlike(path, trained_on(path), data_identity.of_run(self.recipe, self.run_dir))
        return position, [f"resumed from {path} at step {position.step}", *notes]

    def _published(self, path: Path) -> list[str]:
        """Begin from the weights of a Hugging Face directory."""
        refuse_rounded_masters(self.recipe, path)
        notes = load_published(path, self.recipe, self.trainer.models, self.run_dir)
        return [f"began from {path}", *notes, *begin_from_weights(self.trainer.optimizer, self.ema)]
