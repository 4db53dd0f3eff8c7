"""Recipes, overrides, command lines, files of a run directory, manifests and tokenizers, changed at random, in-process.

    python tools/fuzz_recipes.py --inputs 2000 --seed 1

A fifth are harmless changes (order of keys, white space, comments, other spellings of numbers, other valid values): all
have to be accepted with the right value. The others are refused by a `UserError` (a command: one that exits with 2), or
accepted with what another reader finds in them: PyYAML's and Python's own, FP32 arithmetic by NumPy, and `tokenizers`
without this project. Nothing raises anything else, prints control characters, leaves a file, takes more than 60 s, or
leaves the process with more than 2 GiB.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import yaml

from dsv3_cli import main
from dsv3_train.data import manifest
from dsv3_train.data.cutting import Cutter
from dsv3_train.data.tokenizer import Tokenizer, train
from dsv3_train.errors import UserError
from dsv3_train.lines import newest_step
from dsv3_train.optim.schedules import Schedules
from dsv3_train.recipe.compose import shipped
from dsv3_train.recipe.load import dump, load, settings, values
from dsv3_train.runtime import incidents
from dsv3_train.training import data_identity, log, skips

SECONDS, MEMORY = 60, 2 << 30
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
NASTY: tuple[Any, ...] = (
    None, True, False, "", " ", "\x1b[2J\x07", "\u202e", "$(touch pwned)", "`id`", "'\"", "a\nb", "${env:HOME}",
    "${env:NO_SUCH}", "${", "../../etc/passwd", "/dev/zero", "x" * 5000, "\u0664\u0665", 0, -1, 1, 1 << 31, 1 << 63,
    1 << 70, 10**18, 10**30, 10**400, 1e-300, 5e-324, 1e300, -1e-9, 0.5, float("nan"), float("inf"), [], {}, [[]],
    {"a": {"b": []}}, [0, 1], [1e300, 0], "2000 steps", "9" * 30 + " steps", "14.8T", "1e9999999", "0x10", "1_000",
    "!!python/object/apply:os.system [touch pwned]", "*a", "&a b",
)  # fmt: skip
# Values that FP32 or a counter of 64 bits has to hold, and what they may not be.
POSITIVE_IN_FP32 = {
    "model.rms_norm_eps", "model.rope_theta", "model.routed_scaling_factor", "model.initializer_range", "optim.eps",
}  # fmt: skip
TEXTS = ["def main():\n    return 1\n", "Hello, world", "\u4f60\u597d <|eos_token|>", "", "a" * 300, "\x00\x1b\ud7ff"]


class Wrong(Exception):
    """What may not happen."""


class Inputs:
    """What is changed: whole inputs, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = values(load("smoke"))
        self.tokenizer = json.loads(train(["the cat sat on the mat, and the dog lay on the log " * 20], 300))
        self.manifest = {
            "format": 1,
            "settings": {"inputs": ["a.txt"], "tokenizer": None, "vocab_size": 300, "fim_rate": 0.1, "seed": 1,
                         "text_key": "text", "eos_token": None},
            "counts": {"files": 1, "documents": 2, "bytes": 30, "characters": 30, "tokens": 9, "fim_documents": 0,
                       "empty_documents": 0, "bad": 1},
            "bad": [{"file": "a.txt", "line": 3, "reason": "no JSON"}],
            "tokenizer": {"sha256": "0" * 64, "vocab_size": 300, "eos_id": 0, "trained_on_characters": 30,
                          "training_bound_characters": 1000},
            "dtype": "uint16", "max_token": 299, "unigram_entropy": 1.5, "sha256": {"bin": "0" * 64, "idx": "0" * 64},
            "blocks": [], "inputs": [{"name": "a.txt", "bytes": 30, "sha256": "0" * 64}], "versions": {"numpy": "2"},
        }  # fmt: skip
        self.skip = {"first": 8, "last": 15, "reason": "spike", "step": 2, "loss": 9.5}
        self.metric = {"kind": "step", "step": 3, "loss": 4.5, "lr": 1e-3, "consumed_tokens": 99, "mtp_loss": None}
        self.incident = {"time": "2026-01-01 00:00:00", "kind": "spike", "text": "step 3: a spike", "step": 3}
        self.identity = {
            "data/x": {
                "identity": {"documents": 2, "tokens": 9, "dtype": "uint16", "index": "0" * 64, "blocks": "0" * 64,
                             "tokenizer": None},
                "notes": ["looked at"], "state": [[1, 2, 3]],
            }
        }  # fmt: skip


def changed(draw: random.Random, plain: Any, times: int) -> Any:
    """A copy with entries taken out, put in, moved or replaced."""
    plain = copy.deepcopy(plain)
    for _ in range(times):
        at, places = plain, []
        while isinstance(at, (dict, list)) and at:
            key = draw.choice(list(at)) if isinstance(at, dict) else draw.randrange(len(at))
            places.append((at, key))
            at = at[key]
        if not places:
            return draw.choice(NASTY)
        inside, key = draw.choice(places[-2:])
        what = draw.random()
        if what < 0.75:
            inside[key] = copy.deepcopy(draw.choice(NASTY))
        elif what < 0.85:
            del inside[key]
        elif isinstance(inside, dict):
            inside[draw.choice(["x", "\x1b[31m", "base", str(key) + "s", "kind", "type"])] = draw.choice(NASTY)
        else:
            inside.append(draw.choice(NASTY))
    return plain


def torn(draw: random.Random, text: bytes) -> bytes:
    """Bytes lost, doubled or replaced."""
    data = bytearray(text)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(data) + 1)
        what = draw.random()
        if what < 0.3:
            del data[at : at + draw.randrange(1, 40)]
        elif what < 0.6:
            data[at:at] = draw.choice(
                [b"\x00", b"\xff", b"\t", b"[" * 3000, b"{", b"\n", b"NaN", b"-", b"1e999", b"\x1b"]
            )
        else:
            data[at : at + 1] = bytes([draw.randrange(256)])
    return bytes(data)


def shuffled(draw: random.Random, plain: Any) -> Any:
    """The same, with keys of mappings in another order."""
    if isinstance(plain, dict):
        return {key: shuffled(draw, plain[key]) for key in draw.sample(list(plain), len(plain))}
    return [shuffled(draw, item) for item in plain] if isinstance(plain, list) else plain


def written(draw: random.Random, plain: Any) -> bytes:
    """As JSON, somehow."""
    text = json.dumps(plain, indent=draw.choice([None, 1, 4]), ensure_ascii=draw.random() < 0.7)
    return text.encode("utf-8", "surrogatepass")


# Each takes the draw, the inputs and whether the change is harmless, and returns whether the input was accepted.


def recipe_file(draw: random.Random, given: Inputs, harmless: bool) -> bool:
    """`load`, `Schedules` and back through `dump`; the oracle is PyYAML on the same text."""
    path, plain = given.folder / "r.yaml", given.recipe
    plain = other_valid(draw, plain) if harmless else changed(draw, plain, draw.randrange(1, 4))
    wide, flow = draw.random() < 0.5, draw.random() < 0.2
    text = yaml.dump(shuffled(draw, plain), sort_keys=False, width=10**6 if wide else 40, default_flow_style=flow)
    if wide and not flow:  # else a line may end within a text
        text = re.sub(r"(?m)^(\s*[a-z_]+: .*[0-9a-z])$", lambda f: f[1] + draw.choice(["", "  # so", "   "]), text)
    data = text.encode("utf-8", "surrogatepass")
    if not harmless and draw.random() < 0.3:
        data = torn(draw, data)
    path.write_bytes(data)
    recipe = load(str(path))
    Schedules(recipe)
    if settings(load_text(given, dump(recipe))) != settings(recipe):
        raise Wrong("reads otherwise after it was written")
    if harmless and settings(recipe) != settings(load_text(given, yaml.dump(plain, sort_keys=False))):
        raise Wrong("a harmless change changed a value")
    sane(settings(recipe), yaml.safe_load(data))
    return True


def load_text(given: Inputs, text: str) -> Any:
    path = given.folder / "again.yaml"
    path.write_text(text, encoding="utf-8")
    return load(str(path))


def other_valid(draw: random.Random, plain: Any) -> Any:
    """Other values that every recipe may have."""
    plain = copy.deepcopy(plain)
    for section, key, options in (
        ("model", "rms_norm_eps", [1e-5, 1e-6]), ("model", "rope_theta", [1e4, 50000, 1e6]), ("optim", "eps", [1e-9]),
        ("optim", "clip_grad_norm", [0, 1, 0.5]), ("training", "seed", [-1]), ("data", "seed", [0, 4_000_000_000]),
        ("model", "routed_scaling_factor", [1, 2.446, 2.5]), ("training", "duration", ["50 steps", "1M", 4_000_000]),
        ("schedule", "lr", [0, 1e-3, [{"linear": [0, 1e-3], "until": "5 steps"}, {"constant": 1e-3}]]),
        ("faults", "hang_seconds", [0, 600]), ("logging", "interval", [1, 10]), ("checkpoint", "keep_last", [1, 9]),
    ):  # fmt: skip
        if draw.random() < 0.3:
            plain[section][key] = draw.choice(options)
    return plain


def sane(found: dict[str, Any], text: Any) -> None:
    """What was accepted against the text as PyYAML reads it, and as FP32 holds it."""
    for key in POSITIVE_IN_FP32:
        value = np.float32(found[key])
        if not (np.finfo(np.float32).tiny <= value < np.inf):
            raise Wrong(f"{key} = {found[key]} is {value} in FP32")
    for key, value in found.items():
        if isinstance(value, float) and not math.isfinite(np.float32(value)):
            raise Wrong(f"{key} = {value} in FP32")
        if type(value) is int and abs(value) >= 1 << 63:
            raise Wrong(f"{key} = {value} in 64 bits")
        at = text
        for step in key.split("."):
            at = at.get(step) if isinstance(at, dict) else None
        if type(at) in (int, float) and type(value) in (int, float) and at != value:
            raise Wrong(f"{key} = {value}, where the text says {at}")


def override(draw: random.Random, given: Inputs, harmless: bool) -> bool:
    """`KEY=VALUE` on a shipped recipe."""
    keys = list(settings(load("smoke")))
    if harmless:
        key, value = draw.choice([("training.seed", 7), ("optim.eps", 1e-9), ("schedule.lr", 0.002), ("data.seed", 3)])
        space = draw.choice(["", " "])
        found = settings(load("smoke", [f"{key}={space}{value}{space}"]))
        if found[key] != value:
            raise Wrong(f"{key}={value} gave {found[key]}")
        return True
    told = []
    for _ in range(draw.randrange(1, 4)):
        value = draw.choice(NASTY)
        spelt = value if isinstance(value, str) else json.dumps(value)
        told.append(draw.choice([f"{draw.choice(keys)}={spelt}", f"{draw.choice(keys)}.{spelt}", spelt, f"a={spelt}"]))
    recipe = load("smoke", told)
    Schedules(recipe)
    sane(settings(recipe), None)
    return True


WORDS = ("recipes", "show", "diff", "list", "schema", "train", "--dry-run", "--json", "data", "index", "prepare",
         "--output", "--samples", "generate", "--ids", "slurm", "status", "submit", "logs", "cancel", "pipeline",
         "simulate", "convert", "inspect", "profile", "analyze", "numerics", "compare", "doctor", "--help",
         "-x", "--")  # fmt: skip
HEAVY = {"train", "doctor", "preflight", "run", "submit", "cancel", "prepare", "numerics", "pipeline"}
"""Commands that begin work, take minutes or talk to a cluster; of them only the help."""


def command(draw: random.Random, given: Inputs, harmless: bool) -> bool:
    """A command line through `dsv3`'s own entry point."""
    if harmless:
        name = draw.choice(list(shipped()))
        asked = draw.choice([["recipes", "show", name, "--json"], ["recipes", "show", "--json", name]])
        code, out, _ = entered(asked)
        if code != 0 or json.loads(out) != json.loads(json.dumps(values(load(name)))):
            raise Wrong(f"{asked}: exit code {code}")
        return True
    strange = [str(value) for value in NASTY if isinstance(value, str)] + ["smoke", "no/such", str(given.folder)]
    asked = [draw.choice(WORDS)] + [
        draw.choice([draw.choice(WORDS), draw.choice(strange)]) for _ in range(draw.randrange(5))
    ]
    if HEAVY & set(asked):
        asked.append("--help")
        asked = [word for word in asked if word != "--"]
    code, out, err = entered([word.replace("\x00", "") for word in asked])
    if code not in (0, 2):
        raise Wrong(f"{asked}: exit code {code}: {err[-300:]}")
    if "Traceback" in err or "fault of dsv3" in err:
        raise Wrong(f"{asked}: {err[-300:]}")
    if found := OBEYED.search(out + err):
        raise Wrong(f"{asked}: prints {found[0]!r}")
    if code == 2 and len(err.splitlines()) > 101:
        raise Wrong(f"{asked}: {len(err.splitlines())} lines")
    return code == 0


def entered(asked: list[str]) -> tuple[Any, str, str]:
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["dsv3", *asked]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.run()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def run_directory(draw: random.Random, given: Inputs, harmless: bool) -> bool:
    """skips.jsonl, metrics.jsonl, incidents.jsonl, data.json."""
    folder = given.folder / "run"
    folder.mkdir(exist_ok=True)
    which = draw.choice(["skips", "metrics", "incidents", "data"])
    base = {"skips": given.skip, "metrics": given.metric, "incidents": given.incident, "data": given.identity}[which]
    how = shuffled if harmless else (lambda draw, plain: changed(draw, plain, draw.randrange(3)))
    lines = [how(draw, base) for _ in range(draw.randrange(1, 4))]
    text = written(draw, lines[0]) if which == "data" else b"".join(
        json.dumps(line, separators=draw.choice([(",", ":"), (" , ", " : ")])).encode() + b"\n" for line in lines
    )  # fmt: skip
    if not harmless and draw.random() < 0.4:
        text = torn(draw, text)
    path = folder / ("data.json" if which == "data" else f"{which}.jsonl")
    path.write_bytes(text)
    try:
        if which == "skips":
            found = skips.read(folder)
            for skip, line in zip(found, text.splitlines(), strict=True):
                if {**vars(skip)} != {**vars(skips.Skip(0, 0, "spike")), **json.loads(line)}:
                    raise Wrong("another skip than the line's")
                if not (0 <= skip.first <= skip.last < 1 << 63) or not math.isfinite(skip.loss or 0.0):
                    raise Wrong(f"{skip} is none")
            skips.Skips(folder, []).covers(0, 8)
        elif which == "metrics":
            step = newest_step(path)
            if harmless and step != 3:
                raise Wrong(f"step {step}")
            log._drop_after(path, 2)
            if newest_step(path) > 2:
                raise Wrong("a later step stays")
        elif which == "incidents":
            found_incidents = incidents.read(folder, 5)
            if harmless and found_incidents != lines:
                raise Wrong("other incidents")
        else:
            known = data_identity._read(folder)
            if harmless and known["data/x"].identity.tokens != 9:
                raise Wrong("another identity")
    finally:
        path.unlink()
    return True


def manifest_file(draw: random.Random, given: Inputs, harmless: bool) -> bool:
    """`manifest.load`; the oracle is Python's own reader."""
    plain = shuffled(draw, given.manifest) if harmless else changed(draw, given.manifest, draw.randrange(1, 3))
    text = written(draw, plain)
    if not harmless and draw.random() < 0.3:
        text = torn(draw, text)
    manifest.path_of(str(given.folder / "x")).write_bytes(text)
    found = manifest.load(str(given.folder / "x"))
    assert found is not None
    again = json.loads(text)
    for name, value in again["counts"].items():
        if getattr(found.counts, name) != value or value < 0:
            raise Wrong(f"counts.{name} = {value}")
    if not math.isfinite(found.unigram_entropy):
        raise Wrong("entropy is not finite")
    from dsv3_cli.data import _summary

    if OBEYED.search(_summary("x", found)):
        raise Wrong("a control character in the summary")
    return True


def tokenizer_file(draw: random.Random, given: Inputs, harmless: bool) -> bool:
    """Load, encode, decode, cut; the oracle is `tokenizers` alone, on the same file."""
    plain = shuffled_top(draw, given.tokenizer) if harmless else changed(draw, given.tokenizer, draw.randrange(1, 3))
    text = written(draw, plain)
    if not harmless and draw.random() < 0.2:
        text = torn(draw, text)
    path = given.folder / "tokenizer.json"
    path.write_bytes(text)
    found = Tokenizer.load(path)
    Cutter(json.loads(text))
    for sample in TEXTS:
        ids = found.encode(sample)
        found.decode(ids)
        if ids and max(ids) >= found.vocab_size:
            raise Wrong(f"id {max(ids)} of {found.vocab_size}")
        if harmless and found.decode(ids) != sample:
            raise Wrong(f"{sample!r} came back as {found.decode(ids)!r}")
        alone = tokenizers.Tokenizer.from_file(str(path)) if harmless and "<|" not in sample else None
        if alone and ids != alone.encode(sample, add_special_tokens=False).ids:
            raise Wrong(f"other ids for {sample!r}")
    return True


def shuffled_top(draw: random.Random, plain: dict) -> dict:
    """Other order of the keys, but of the vocabulary's."""
    return {key: plain[key] for key in draw.sample(list(plain), len(plain))}


TARGETS: tuple[Callable[[random.Random, Inputs, bool], bool], ...] = (
    recipe_file, recipe_file, override, command, run_directory, manifest_file, tokenizer_file,
)  # fmt: skip


def too_long(*_: object) -> None:
    raise Wrong(f"more than {SECONDS} s")


def run(inputs: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """How inputs ended, by kind, and what was wrong."""
    came: Counter[str] = Counter()
    wrong: list[str] = []
    given = Inputs(folder)
    before = os.getcwd()
    signal.signal(signal.SIGALRM, too_long)
    try:
        os.chdir(folder)
        for number in range(inputs):
            draw = random.Random(f"{seed}:{number}")
            harmless, target = number % 5 == 0, draw.choice(TARGETS)
            there = set(os.listdir(folder))
            signal.alarm(SECONDS)
            try:
                ended = "accepted" if target(draw, given, harmless) else "refused"
            except UserError as error:
                ended = "refused"
                if OBEYED.search(str(error)) or not str(error):
                    wrong.append(f"{seed}:{number} {target.__name__}: says {str(error)[:200]!r}")
            except Wrong as error:
                ended = "wrong"
                wrong.append(f"{seed}:{number} {target.__name__}: {error}")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                ended = "raised"
                last = traceback.extract_tb(error.__traceback__)[-1]
                wrong.append(f"{seed}:{number} {target.__name__}: {error!r:.200} at {last.filename}:{last.lineno}")
            finally:
                signal.alarm(0)
            came[ended] += 1
            if harmless:
                came["harmless"] += 1
                if ended == "refused":
                    wrong.append(f"{seed}:{number} {target.__name__}: a harmless change is refused")
            new = set(os.listdir(folder)) - there - {"r.yaml", "again.yaml", "run", "tokenizer.json", "x.manifest.json"}
            if new:
                wrong.append(f"{seed}:{number} {target.__name__}: left {sorted(new)}")
    finally:
        os.chdir(before)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if used > MEMORY:
        wrong.append(f"{used >> 20} MiB")
    return came, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        came, wrong = run(arguments.inputs, arguments.seed, Path(place))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{arguments.inputs} inputs in {time.monotonic() - start:.0f} s, {memory} MiB: {dict(came)}")
    print("\n".join(wrong))
    sys.exit(bool(wrong))
