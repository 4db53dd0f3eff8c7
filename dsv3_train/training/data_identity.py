"""RUN_DIR/data.json: which data a run was trained on, so that it does not change under the run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dsv3_train import regular, whole
from dsv3_train.checkpoint.directory import complete
from dsv3_train.data.identity import Identity, Met, meet, state
from dsv3_train.data.sets import train_sets
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Recipe

NAME = "data.json"
_READER = TypeAdapter(dict[str, Met])


def refuse_other(recipe: Recipe, run_dir: Path) -> dict[str, Met]:
    """Look at a run's datasets, unless it did so before and their files are as they were.

    Returns them by prefix.

    Raises:
        UserError: one is damaged, or is not what the run's checkpoints were trained on.
    """
    known = _read(run_dir)
    found: dict[str, Met] = {}
    for dataset in [*train_sets(recipe), *recipe.data.valid]:
        before = known.get(dataset.path)
        if before is not None and before.state == state(dataset.path):
            found[dataset.path] = before
            continue
        met = found[dataset.path] = meet(dataset.path, recipe.model.vocab_size)
        changes = before.identity.unlike(met.identity) if before else []
        trained = complete(run_dir / "checkpoints")
        if changes and trained:
            raise UserError(
                f"{dataset.path}: is not the data that {run_dir} was trained on up to {trained[-1].name} "
                f"({', '.join(changes)}); put that back, or set another runtime.run_dir, or, to go on with this data "
                f"nevertheless, remove {run_dir / NAME}"
            )
    return found


def keep(recipe: Recipe, run_dir: Path) -> list[str]:
    """Record the datasets of a run that begins or goes on; what to say of them.

    Raises:
        UserError: see `refuse_other`; or it cannot be written.
    """
    known, found = _read(run_dir), refuse_other(recipe, run_dir)
    notes = [note for met in found.values() for note in met.notes]
    if not known and complete(run_dir / "checkpoints"):
        notes.append(
            f"{run_dir / NAME}: records from now on which data this run is trained on; it was not known before"
        )
    merged = {prefix: asdict(met) for prefix, met in {**known, **found}.items()}
    whole.write(run_dir / NAME, json.dumps(merged, indent=1))
    return notes


def of_run(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """The identities of what a run is trained on, for its checkpoints; nothing where none is recorded."""
    known = _read(run_dir)
    return {path: asdict(known[path].identity) for path in (one.path for one in train_sets(recipe)) if path in known}


def unlike(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Notes on a checkpoint that was trained on other data than this run's, by what both recorded."""
    notes = []
    for prefix in saved.keys() & now.keys():
        try:
            changes = Identity(**saved[prefix]).unlike(Identity(**now[prefix]))
        except TypeError:  # of another version
            continue
        if changes:
            notes.append(f"{path} was trained on other data than {prefix} is now ({', '.join(changes)})")
    if saved and now and not saved.keys() & now.keys():
        notes.append(
            f"{path} was trained on {', '.join(sorted(saved))}; this run goes on with {', '.join(sorted(now))}"
        )
    return notes


def _read(run_dir: Path) -> dict[str, Met]:
    path = run_dir / NAME
    try:
        return _READER.validate_json(regular.read(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path}: not a record of a run's data: {where}: {first['msg']}; remove it, and the run writes a new one"
        ) from None
