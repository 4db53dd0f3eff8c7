"""Text files to an indexed dataset: tokenizer, shards in worker processes, merge. Killed, it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers

import dsv3_train
from dsv3_train.data import formats, index, manifest, parts, quality, shard
from dsv3_train.data.compression import Damaged
from dsv3_train.data.cutting import Cutter
from dsv3_train.data.documents import Fault, Piece, read
from dsv3_train.data.formats import Format
from dsv3_train.data.inputs import InputFile, find
from dsv3_train.data.manifest import Manifest
from dsv3_train.data.merge import merge
from dsv3_train.data.parts import BeingPrepared
from dsv3_train.data.shard import Part, Shard, Work
from dsv3_train.data.special_tokens import CONFIGURATION, DEFINITION
from dsv3_train.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer, train
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Prepare
from dsv3_train.runtime.workers import each
from dsv3_train.runtime.workers import pool as workers_pool

__all__ = ["BeingPrepared", "changed_inputs", "prepare"]

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total), the latter two in bytes."""

TRAINING_BOUND = 32_000_000
"""Characters that a tokenizer is trained on at most: BPE merges settle long before, time and memory do not."""
_LARGEST_VOCABULARY = 1 << 24
_PUBLISHED = ("bin", "idx", "tokenizer.json", "tokenizer_config.json", "manifest.json")


def prepare(
    settings: Prepare,
    progress: Progress = lambda stage, done, total: None,
    *,
    text_key: str = "text",
    workers: int | None = None,
    compare: bool = False,
) -> Manifest:
    """Make the dataset at `settings.output`, or return at once if it is there.

    Writes OUTPUT.bin, .idx, .tokenizer.json, .tokenizer_config.json and, last, .manifest.json, each by rename from
    OUTPUT.parts, where a killed run leaves what it had finished. The result depends on inputs and settings alone, not
    on `workers` (processes; None: one per core).

    Args:
        compare: refuse data that is there if its inputs hold other files now (`changed_inputs`).

    Raises:
        UserError: an input, the tokenizer or the output path is at fault, too much of the corpus cannot be read
            (`settings.max_bad`) or spelled by the tokenizer, or other data is at `settings.output`.
        BeingPrepared: another process is at it.
    """
    try:
        return _prepare(settings, progress, text_key, workers or len(os.sched_getaffinity(0)), compare)
    except OSError as error:
        raise UserError(f"{error.filename or settings.output}: {error.strerror or error}") from None
    except BrokenProcessPool:
        raise UserError(
            f"{settings.output}: a worker process was killed (out of memory? each takes up to 3 GiB); finished parts "
            "are kept, run again with fewer workers"
        ) from None


def _prepare(settings: Prepare, progress: Progress, text_key: str, workers: int, compare: bool) -> Manifest:
    prefix = _checked_prefix(settings.output)
    given = Tokenizer.load(settings.tokenizer, settings.eos_token) if settings.tokenizer else None
    if given and given.eos_id in given.encode(given.spelling("eos")):
        raise UserError(
            f"{given.name}: reads the text {given.spelling('eos')} inside a document as its end; give another tokenizer"
        )
    if settings.eos_token and not given:
        raise UserError("eos_token: is for a tokenizer that is given; one that is trained has its own; leave it out")
    asked = manifest.Settings(
        inputs=settings.inputs,
        tokenizer=given.sha256 if given else None,
        vocab_size=None if given else settings.vocab_size,
        fim_rate=settings.fim_rate,
        seed=settings.seed,
        text_key=text_key,
        eos_token=settings.eos_token,
    )
    if existing := _existing(prefix, asked, given.eos_id if given else None):
        if compare and (changes := changed_inputs(settings)):
            raise UserError(f"{prefix}: {changes}; {_again(prefix)}")
        return existing
    if given and settings.fim_rate:
        for role in ("fim_begin", "fim_hole", "fim_end"):
            given.special(role)
    if given and given.vocab_size > _LARGEST_VOCABULARY:
        raise UserError(
            f"{given.name}: token {given.vocab_size - 1} is beyond any tokenizer; give one of at most "
            f"{_LARGEST_VOCABULARY} tokens"
        )
    if not given and settings.vocab_size > _LARGEST_VOCABULARY:
        raise UserError(f"vocab_size: {settings.vocab_size} is beyond any tokenizer; set at most {_LARGEST_VOCABULARY}")
    if not given and settings.vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size: {settings.vocab_size} is less than all bytes and the special tokens; "
            f"set at least {SMALLEST_VOCABULARY}"
        )
    files = find(settings.inputs)
    names = ", ".join(settings.inputs)
    with parts.directory(prefix) as made_in, workers_pool(workers) as pool:
        files, hashes = _examine(files, text_key, pool, progress)
        found = quality.look(files, text_key)
        quality.refuse_unreadable(found, settings.max_bad, names)
        tokenizer, trained_on = _tokenizer(made_in, settings, given, files, hashes, text_key, progress)
        quality.refuse_lossy(found, given or tokenizer, names)
        work = Work(
            parts=str(made_in),
            tokenizer=tokenizer.name,
            fim_rate=settings.fim_rate,
            seed=settings.seed,
            text_key=text_key,
            dtype="uint16" if tokenizer.vocab_size <= 2**16 else "int32",
        )
        shards = shard.plan(files, hashes, work, f"{tokenizer.sha256} {tokenizer.eos_id}")
        results = _tokenise(shards, work, pool, progress)
        counts, bad = _counts(files, results)
        if counts.documents == 0:
            reason = f"; {_place(bad[0])}: {bad[0].reason}" if bad else ""
            raise UserError(f"{names}: no document with text among {counts.files} files{reason}")
        first = f"{_place(bad[0])}: {bad[0].reason}" if bad else ""
        quality.refuse(results, counts.files, first, given or tokenizer, settings.max_bad, names)
        merged = merge(results, work, tokenizer.vocab_size, progress)
        result = Manifest(
            settings=asked,
            counts=counts,
            bad=bad,
            tokenizer=manifest.TokenizerFacts(
                sha256=tokenizer.sha256,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
                trained_on_characters=trained_on,
                training_bound_characters=None if given else TRAINING_BOUND,
            ),
            dtype=work.dtype,
            max_token=merged.max_token,
            unigram_entropy=merged.unigram_entropy,
            sha256={"bin": merged.bin_sha256, "idx": merged.idx_sha256},
            blocks=merged.bin_blocks,
            inputs=[manifest.Source(name=f.name, bytes=f.size, sha256=hashes[f.path]) for f in files],
            versions={
                "dsv3_train": dsv3_train.__version__,
                "tokenizers": tokenizers.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        )
        manifest.save(result, made_in / "manifest.json")
        shutil.copyfile(tokenizer.name, made_in / "published.json")
        (made_in / "published_config.json").write_bytes(tokenizer.complete()[CONFIGURATION])
        told = (made_in / "published.json", made_in / "published_config.json", made_in / "manifest.json")
        finished = (merged.bin, merged.idx, *told)
        for unfinished, name in zip(finished, _PUBLISHED, strict=True):
            _publish(unfinished, Path(f"{prefix}.{name}"))
    return result


def _checked_prefix(prefix: str) -> str:
    if not os.path.basename(prefix) and not prefix.endswith("/"):
        raise UserError("output: empty; give a prefix, such as data/corpus")
    if prefix.endswith("/") or os.path.isdir(prefix):
        raise UserError(f"{prefix}: is a directory; give a prefix in it, such as {prefix.rstrip('/')}/corpus")
    return prefix


def _existing(prefix: str, asked: manifest.Settings, eos_id: int | None) -> Manifest | None:
    """What is at `prefix` if it is what is asked for, `eos_id` ending its documents; None if nothing is."""
    found = manifest.load(prefix)
    if found is None:
        for name in ("bin", "idx"):
            # An interrupted run of ours may have got as far as this, but then its parts are still there.
            if os.path.exists(f"{prefix}.{name}") and not parts.left(prefix):
                raise UserError(
                    f"{prefix}.{name}: exists without a manifest, so it is not ours to overwrite; "
                    "remove it or choose another output"
                )
        return None
    for key, value in asked:
        if getattr(found.settings, key) != value:
            raise UserError(
                f"{prefix}: prepared with {key} {getattr(found.settings, key)!r}, not {value!r}; {_again(prefix)}"
            )
    if eos_id not in (None, found.tokenizer.eos_id):
        raise UserError(f"{prefix}: documents end with token {found.tokenizer.eos_id}, not {eos_id}; {_again(prefix)}")
    index.read(prefix)
    return found


def _again(prefix: str) -> str:
    return f"choose another output, or remove {prefix}.manifest.json, .bin and .idx to prepare again"


def changed_inputs(settings: Prepare) -> str | None:
    """How the inputs' files differ, by name and size, from those that the data at `settings.output` was made of.

    None: they do not, or there is no data. An input that is gone altogether is not compared: prepared data does not
    need it.
    """
    made = manifest.load(settings.output)
    if made is None:
        return None
    ours = {os.path.realpath(f"{settings.output}.{end}") for end in _PUBLISHED}  # it may lie among its inputs
    before = {one.name: one.bytes for one in made.inputs if os.path.realpath(one.name) not in ours}
    present = [given for given in settings.inputs if _is_there(given)]
    now = {file.name: file.size for file in find(present) if os.path.realpath(file.path) not in ours}
    changes = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now] if present == settings.inputs else [],
        "of another size": [name for name in now if now[name] != before.get(name, now[name])],
    }
    told = [
        f"{what}: {min(names)}" + (f" and {len(names) - 1} more" if names[1:] else "")
        for what, names in changes.items()
        if names
    ]
    return f"its inputs are not the files that it was made of ({', '.join(told)})" if told else None


def _is_there(given: str) -> bool:
    try:
        return bool(find([given]))
    except UserError:
        return False


def _examine(
    files: list[InputFile], text_key: str, pool: Executor | None, progress: Progress
) -> tuple[list[InputFile], dict[str, str]]:
    """The files with their formats, and the sha256 of each by path."""
    hashes: dict[str, str] = {}
    known: dict[str, Format] = {}
    done, total = 0, sum(file.size for file in files)
    # Many small files make one task: handing a file over costs more than hashing it.
    groups = [files[i : i + 64] for i in range(0, len(files), 64)]
    for number, result in each(pool, examine, [([file.path for file in group], text_key) for group in groups]):
        for file, (digest, found) in zip(groups[number], result, strict=True):
            hashes[file.path], known[file.path] = digest, found
            done += file.size
        progress("hashing", done, total)
    return [replace(file, format=known[file.path]) for file in files], hashes


def examine(paths: list[str], text_key: str) -> list[tuple[str, Format]]:
    """sha256 and format of each file."""
    found = []
    for path in paths:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        found.append((digest.hexdigest(), formats.look(path, text_key)))
    return found


def _tokenizer(
    made_in: Path,
    settings: Prepare,
    given: Tokenizer | None,
    files: list[InputFile],
    hashes: dict[str, str],
    text_key: str,
    progress: Progress,
) -> tuple[Tokenizer, int | None]:
    """The tokenizer as a file in `made_in`, and the characters it was trained on."""
    if given:
        for name, bytes_of in given.complete().items():  # workers take their tokens from the configuration
            (made_in / f"given.{name}").write_bytes(bytes_of)
        return Tokenizer.load(made_in / f"given.{DEFINITION}"), None
    content = "".join(hashes[file.path] for file in files)
    key = hashlib.sha256(f"{settings.vocab_size} {text_key} {TRAINING_BOUND} {content}".encode()).hexdigest()[:32]
    sizes = list(made_in.glob(f"trained-{key}-*.json"))
    if not sizes:
        seen = 0

        def counted() -> Iterator[str]:
            nonlocal seen
            for text in _sample(files, text_key):
                seen += len(text)
                progress("training tokenizer", min(seen, TRAINING_BOUND), TRAINING_BOUND)
                yield text

        definition = train(counted(), settings.vocab_size)
        unfinished = made_in / "trained.tmp"
        unfinished.write_bytes(definition)
        sizes = [made_in / f"trained-{key}-{seen}.json"]
        os.replace(unfinished, sizes[0])
    return Tokenizer.load(sizes[0]), int(sizes[0].stem.split("-")[-1])


def _sample(files: list[InputFile], text_key: str) -> Iterator[str]:
    """Documents to train a tokenizer on: the beginning of every file, TRAINING_BOUND characters in all.

    Long ones come in pieces, of which the tokenizer counts the same words; one that cannot be cut is left out.
    """
    per_file = max(TRAINING_BOUND // len(files), 1 << 20)
    left = TRAINING_BOUND
    cutter = Cutter(json.loads(train([], SMALLEST_VOCABULARY)))
    for file in files:
        left_of_file = min(per_file, left)
        for _, item in read(Piece(file, 0, file.size), text_key):
            if item and not isinstance(item, Fault):
                texts = [item[:left_of_file]] if isinstance(item, str) else item.characters(0, left_of_file)
                try:
                    for text in cutter.pieces(texts):
                        yield text
                        left_of_file, left = left_of_file - len(text), left - len(text)
                except Damaged:  # told when it is tokenised
                    pass
            if left_of_file == 0:
                break
        if left == 0:
            return


def _tokenise(shards: list[Shard], work: Work, pool: Executor | None, progress: Progress) -> list[Part]:
    """Every shard's part, in order; those of an earlier run are taken over."""
    results = [shard.finished(one, work) for one in shards]
    missing = [number for number, result in enumerate(results) if result is None]
    total = sum(one.size for one in shards)
    done = total - sum(shards[number].size for number in missing)
    progress("tokenising", done, total)
    for number, result in each(pool, shard.tokenise, [(shards[number], work) for number in missing]):
        results[missing[number]] = result
        done += shards[missing[number]].size
        progress("tokenising", done, total)
    return results  # type: ignore[return-value]


def _counts(files: list[InputFile], results: list[Part]) -> tuple[manifest.Counts, list[manifest.Bad]]:
    """Sums over the parts, and the first faults with their lines counted from the beginning of their file."""
    bad: list[manifest.Bad] = []
    lines_before: dict[str, int] = {}
    for part in results:
        for file, line, reason in part.faults:
            bad.append(manifest.Bad(file=file, line=line + lines_before.get(file, 0) if line else None, reason=reason))
        for file, lines in part.lines.items():
            lines_before[file] = lines_before.get(file, 0) + lines

    def total(name: str) -> int:
        return sum(getattr(part, name) for part in results)

    names = ("documents", "bytes", "characters", "tokens", "fim_documents", "empty_documents", "bad")
    return manifest.Counts(files=len(files), **{name: total(name) for name in names}), bad[: shard.FAULTS_LISTED]


def _place(bad: manifest.Bad) -> str:
    return bad.file if bad.line is None else f"{bad.file}:{bad.line}"


def _publish(unfinished: Path, final: Path) -> None:
    """Give a finished file its name, once it is on the disk."""
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, final)
