"""RUN/tokenizer/: the files of a run's tokenizer, as transformers reads them, for every command.

They are written when the run begins, from what it begins from (another run, a Hugging Face directory), else from its
recipe; checkpoints keep the sha256 of tokenizer.json. Where a model came with a vocabulary that only code reads
(Moonlight, Kimi), there is a configuration alone until a recipe names a tokenizer.json.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from dsv3_train import whole
from dsv3_train.checkpoint import common
from dsv3_train.checkpoint.directory import complete, resolve
from dsv3_train.checkpoint.hf.origin import FOLDER as PUBLISHED
from dsv3_train.checkpoint.hf.origin import PREFIX
from dsv3_train.data import manifest, special_tokens
from dsv3_train.data.sets import train_sets
from dsv3_train.data.special_tokens import CONFIGURATION, DEFINITION
from dsv3_train.data.tokenizer import Tokenizer, read_definition, tokenizer_path
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import load
from dsv3_train.recipe.schema import Recipe

FOLDER = "tokenizer"
TOKENIZER = "tokenizer"
"""Key of a checkpoint's small state: sha256 of the tokenizer.json that it was trained with."""
_DEEPEST = 10  # runs that began from one another's checkpoints


@dataclass(frozen=True)
class Home:
    """Files of a tokenizer, some of `special_tokens.FILES`, and the place that they are from."""

    files: dict[str, bytes]
    place: Path
    eos_token: str | None = None
    """The recipe's, if it names one."""

    @property
    def sha256(self) -> str | None:
        """Of tokenizer.json; None where there is none."""
        definition = self.files.get(DEFINITION)
        return None if definition is None else hashlib.sha256(definition).hexdigest()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises UserError: there is no tokenizer.json, or it is damaged."""
        if DEFINITION not in self.files:
            raise UserError(
                f"{self.place}: has no tokenizer.json, and the model's own tokenizer code is never run; set "
                "data.tokenizer to a tokenizer.json with this model's vocabulary"
            )
        return Tokenizer(self.files[DEFINITION], str(self.place), self.files, self.eos_token)

    @property
    def stops(self) -> set[int]:
        """Ids that end a text, as far as they are known."""
        return self.tokenizer.stops if DEFINITION in self.files else special_tokens.stops(self.files, str(self.place))

    def write(self, folder: Path) -> None:
        """Each file whole or not at all."""
        for name, content in self.files.items():
            whole.write(folder / name, content)


def find(run_dir: Path, recipe: Recipe) -> Home | None:
    """The tokenizer of a run: its own directory's, else what the run begins with; None where none is known.

    The recipe's `data.tokenizer` counts where neither has a tokenizer.json, its `data.eos_token` in any case.

    Raises:
        UserError: a file is damaged or a link to elsewhere, or the vocabulary lacks `data.eos_token`.
    """
    home = _carried(run_dir, recipe, _DEEPEST)
    if home is None:
        return _completed(recipe)
    files = home.files
    if DEFINITION not in files and (named := _completed(recipe)):
        # A configuration that came with the model stays as it is.
        files = {**(named.files if CONFIGURATION not in files else {}), **files, DEFINITION: named.files[DEFINITION]}
    home = Home(files, home.place, recipe.data.eos_token)
    asked = home.eos_token if DEFINITION in files else None
    if asked and special_tokens.spelling(files, "eos", str(home.place)) != asked:
        return replace(home, files=home.tokenizer.complete())
    return home


def find_checked(run_dir: Path, recipe: Recipe) -> Home | None:
    """`find`, for a recipe that is to be trained, whose keys and data must have the same tokenizer.

    Raises:
        UserError: names the one that has another, or another end of a document; or see `find`.
    """
    home = find(run_dir, recipe)
    if home is None or home.sha256 is None:
        return home
    refuse_named(home, recipe)
    for dataset in (*train_sets(recipe), *recipe.data.valid):
        made = manifest.load(dataset.path)
        if made and made.tokenizer.sha256 != home.sha256:
            raise UserError(
                f"{dataset.path}: was prepared with another tokenizer than this model's, {home.place}; prepare it "
                f"again with --tokenizer {home.place}"
            )
        if made and home.tokenizer.ends_with not in (None, made.tokenizer.eos_id):
            raise UserError(
                f"{dataset.path}: its documents end with token {made.tokenizer.eos_id}, but {home.place} ends them "
                f"with {home.tokenizer.ends_with}; prepare it again, or spell the right token in data.eos_token"
            )
    return home


def refuse_named(home: Home, recipe: Recipe) -> None:
    """Refuse a tokenizer that the recipe's keys lead to and that is not the run's.

    Raises:
        UserError: it is another one, or cannot be read.
    """
    path = _path(recipe)
    if path and home.sha256 not in (None, hashlib.sha256(read_definition(path)).hexdigest()):
        raise UserError(
            f"{path}: is another tokenizer than this model's, {home.place}; set data.tokenizer={home.place}, and "
            "prepare the data with it"
        )


def keep(run_dir: Path, recipe: Recipe) -> list[str]:
    """Make RUN_DIR/tokenizer, or bring it up to the recipe.

    Returns what to say of it: a run that trained before there was such a directory is told where it is from.

    Raises:
        UserError: see `find`; or the directory cannot be written.
    """
    home = find(run_dir, recipe)
    if home is None:
        return []
    folder = run_dir / FOLDER
    if folder.is_dir():
        if home.files != special_tokens.read(folder):
            home.write(folder)
        return []
    unfinished = folder.with_name(f"{FOLDER}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    home.write(unfinished)
    unfinished.rename(folder)
    return [f"{folder}: made from {home.place}"] if complete(run_dir / "checkpoints") else []


def recorded(checkpoint: Path) -> str | None:
    """What a checkpoint keeps under TOKENIZER; None: nothing.

    Raises:
        UserError: its small state cannot be read.
    """
    return common.read(checkpoint).get(TOKENIZER)


def refuse_other(kept: str | None, sha256: str | None, checkpoint: Path) -> None:
    """Refuse a checkpoint that was trained with another tokenizer than the run's.

    Args:
        kept: the checkpoint's; None: saved before they kept it, or without a tokenizer.
        sha256: the run's; None: not known.

    Raises:
        UserError: they differ.
    """
    if None not in (kept, sha256) and kept != sha256:
        raise UserError(
            f"{checkpoint}: was trained with the tokenizer of sha256 {kept}, and the run's is {sha256}; put that "
            f"tokenizer.json back into {FOLDER}/ of its run directory"
        )


def _carried(run_dir: Path, recipe: Recipe | None, depth: int) -> Home | None:
    """What lies in a run directory, else in what its run began from."""
    for place in (
        run_dir / FOLDER,
        run_dir / PUBLISHED,
    ):  # the latter as conversions left it before there was the first
        if files := special_tokens.read(place):
            return Home(files, place)
    begun = recipe.checkpoint.load if recipe else None
    if begun is None or depth == 0:
        return None
    if begun.startswith(PREFIX):
        place = Path(begun.removeprefix(PREFIX))
        files = special_tokens.read(place)
        return Home(files, place) if files else None
    try:
        before = resolve(Path(begun)).parent.parent
    except UserError:
        return None  # gone since
    recipe_file = before / "recipe.yaml"
    theirs = load(str(recipe_file)) if recipe_file.is_file() else None
    return _carried(before, theirs, depth - 1) or (_completed(theirs) if theirs else None)


def _path(recipe: Recipe) -> Path | None:
    """The tokenizer.json that the recipe's keys lead to; None where there is none."""
    try:
        return tokenizer_path(recipe)
    except UserError:
        return None


def _completed(recipe: Recipe) -> Home | None:
    """What the recipe names, with all that an export needs unless nothing says which token ends a document."""
    path = _path(recipe)
    if path is None:
        return None
    named = Tokenizer.load(path, recipe.data.eos_token)
    files = dict(named.files) if named.ends_with is None else named.complete()
    return Home(files, path, recipe.data.eos_token)
