"""Hugging Face directories and our own checkpoints, changed at random, through `dsv3 convert`, in this process.

    python tools/fuzz_checkpoints.py --inputs 2000 --seed 1

A fifth are harmless changes (order of keys, white space, other shards, files beside, other valid values of
config.json): all have to be accepted with the right value. What is accepted of the others is held against other
readers: safetensors and json read the files, numpy compares their bytes with those of what was converted there and
back. Nothing raises anything but lines of plain text, leaves files of a refusal, runs code, takes more than 60 s, or
leaves the process with more than 2 GiB.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from synthetic_hf import CONFIG as PUBLISHED
from synthetic_hf import tensors

from dsv3_train.checkpoint import checksums, common, contents
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import from_hf, to_hf
from dsv3_train.checkpoint.hf.inspect import inspect
from dsv3_train.checkpoint.hf.verify import open_weights, verify
from dsv3_train.errors import UserError

DIRECTORY, CHECKPOINT = "directory", "checkpoint"
SECONDS, MEMORY = 60, 2 << 30
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "max_position_embeddings": 64,
    "rope_scaling": None,
}  # fmt: skip
SHAPING = [name for name in SIZES if name not in (
    "topk_group", "n_group", "num_experts_per_tok", "max_position_embeddings", "rope_scaling", "num_key_value_heads",
    "num_nextn_predict_layers",
)]  # fmt: skip
"""Keys that no other value fits the tensors with."""
VALID: dict[str, tuple[Any, ...]] = {
    "rope_theta": (10000.0, 50000, 1e6), "routed_scaling_factor": (1.0, 2.5, 16), "rms_norm_eps": (1e-6, 1e-5),
    "num_experts_per_tok": (2,), "topk_group": (1, 2), "initializer_range": (0.02, 0.006),
}  # fmt: skip
NASTY: tuple[Any, ...] = (
    None, True, "", "\x1b[2J\x07", "\ud800\u202e", 0, -1, 10**9, 1 << 70, -(1 << 62), 10**400, 1e308, float("nan"),
    float("inf"), "NaN", [], {}, [[[[]]]], {"a": {"b": []}}, "x" * 5000, "../../etc/passwd", [10**9, 0], 0.5,
)  # fmt: skip
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
quiet: Callable[..., None] = lambda *_: None  # noqa: E731


class Wrong(Exception):
    """What may not happen."""


class RunsCode:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARK}",)


MARK = Path(tempfile.gettempdir()) / f"fuzz-checkpoints-{os.getpid()}"


def write(path: Path, arrays: dict[str, tuple[str, tuple[int, ...], bytes]], draw: random.Random | None = None) -> None:
    """A safetensors file, by hand; with `draw` in another order, with more blanks and metadata."""
    names = sorted(arrays)
    if draw:
        draw.shuffle(names)
    header: dict[str, Any] = {}
    at = 0
    for name in names:
        dtype, shape, data = arrays[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    if draw:
        for entry in header.values():
            items = list(entry.items())
            draw.shuffle(items)
            entry.clear()
            entry.update(items)
        header = {"__metadata__": {"format": "pt", "x": "y"}, **dict(draw.sample(list(header.items()), len(header)))}
    text = json.dumps(header, indent=draw.choice([None, 1]) if draw else None).encode()
    text += b" " * (draw.randrange(40) if draw else 0)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(arrays[name][2] for name in names))


def made(path: Path, fp8: bool, shards: int, seed: int) -> None:
    """A directory of random values."""
    numbers = np.random.default_rng(seed)
    config = {**PUBLISHED, **SIZES}
    if not fp8:
        config.pop("quantization_config")
    every: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name, dtype, shape in tensors(config):
        if not fp8 and name.endswith("_scale_inv"):
            continue
        kind = "BF16" if dtype == "F8_E4M3" and not fp8 else dtype
        if kind == "F8_E4M3":
            data = numbers.integers(0, 0x7F, math.prod(shape), dtype=np.uint8)
            data[0] = 0x7E  # 448
            every[name] = kind, shape, data.tobytes()
            continue
        values = numbers.normal(size=math.prod(shape)).astype(np.float32) * 0.05
        values = np.abs(values) + 1e-3 if name.endswith("_scale_inv") else values
        data = values if kind == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)
        every[name] = kind, shape, data.tobytes()
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "LICENSE").write_text("MIT")
    place(path, every, shards, None)


def place(path: Path, every: dict[str, Any], shards: int, draw: random.Random | None) -> None:
    """Put tensors into so many files, with an index."""
    for file in path.glob("*.safetensors*"):
        file.unlink()
    names = list(every)
    if draw:
        draw.shuffle(names)
    if shards == 1:
        return write(path / "model.safetensors", every, draw)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: every[name] for name in names[number::shards]}
        write(path / file, part, draw)
        weight_map |= dict.fromkeys(part, file)
    size = sum(len(data) for _, _, data in every.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    )


def read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory's files as the safetensors library gives them: type, shape, bytes."""
    from safetensors import deserialize

    found = {}
    index = path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"] if index.is_file() else None
    for file in sorted(set(listed.values())) if listed else ["model.safetensors"]:
        for name, view in deserialize((path / file).read_bytes()):
            if name in found:
                raise Wrong(f"{name} is twice in what was accepted")
            found[name] = view["dtype"], tuple(view["shape"]), bytes(view["data"])
    return found


def shuffled(draw: random.Random, value: Any) -> Any:
    """The same JSON with its keys in another order."""
    if not isinstance(value, dict):
        return value
    items = [(key, shuffled(draw, inside)) for key, inside in value.items()]
    draw.shuffle(items)
    return dict(items)


def harmless(draw: random.Random, path: Path) -> dict[str, Any]:
    """Change a Hugging Face directory in what means nothing or means what it says; the changed values."""
    config = json.loads((path / "config.json").read_text())
    changed = {key: draw.choice(VALID[key]) for key in draw.sample(list(VALID), draw.randrange(3))}
    config |= changed
    if draw.random() < 0.5:
        config |= {"_name_or_path": "x", "some_key_of_tomorrow": {"a": [1]}}
    text = json.dumps(shuffled(draw, config), indent=draw.choice([None, 1, "\t"]))
    (path / "config.json").write_text(f"{draw.choice(['', ' ', chr(10)])}{text}\n")
    if draw.random() < 0.6:
        place(path, read(path), draw.choice([1, 2, 3, 5]), draw)
    index = path / "model.safetensors.index.json"
    if index.exists() and draw.random() < 0.5:
        index.write_text(json.dumps(shuffled(draw, json.loads(index.read_text())), indent=4))
    if draw.random() < 0.4:
        (path / draw.choice(["README.md", "notes with blanks.txt", "modeling.py", "日本.txt"])).write_text("words")
    if draw.random() < 0.2:
        (path / "more").mkdir()
        (path / "more" / "x.safetensors").write_text("of another model")
    if draw.random() < 0.2:
        os.chmod(path / "config.json", 0o444)
    return changed


def leaf(draw: random.Random, value: Any) -> tuple[Any, Any]:
    """A container within JSON and a key of it."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        inside = value[key]
        if not (isinstance(inside, (dict, list)) and inside) or draw.random() < 0.3:
            return value, key
        value = inside


def damage_json(draw: random.Random, text: str) -> str:
    """Other values, keys gone, given twice or renamed, or no JSON at all."""
    kind = draw.random()
    if kind < 0.15:
        at = draw.randrange(len(text))
        return draw.choice([text[:at], text[:at] + draw.choice('{}[],:"\\\x00\x1b9') + text[at + 1 :], "", "[" * 10**5])
    value = json.loads(text)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        where, key = leaf(draw, value)
        if kind < 0.3:
            del where[key]
        elif kind < 0.4 and isinstance(where, dict):
            where[draw.choice(["\x1b]0;x\x07", "\ud800", "", f"{key}\u202e", "__metadata__"])] = where.pop(key)
        elif isinstance(where[key], int) and draw.random() < 0.5:
            where[key] += draw.choice([1, -1, 128, 10**9, 10**8, -(10**9), 1 << 63])
        else:
            where[key] = copy.deepcopy(draw.choice(NASTY))
        if not value:
            break
    return json.dumps(value)


def damage(draw: random.Random, file: Path) -> None:
    """One file, in any way."""
    data, kind = bytearray(file.read_bytes()), draw.random()
    if file.name.endswith(".json") and kind < 0.75:
        return file.write_bytes(damage_json(draw, data.decode()).encode("utf-8", "surrogatepass")) and None
    if file.name.endswith(".safetensors") and kind < 0.4:
        length = int.from_bytes(data[:8], "little")
        text = damage_json(draw, data[8 : 8 + length].decode()).encode("utf-8", "surrogatepass")
        return file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :]) and None
    if kind < 0.5:
        return odd(draw, file)
    if kind < 0.6:
        data[:8] = struct.pack("<Q", draw.choice([0, 1, len(data), 1 << 40, (1 << 64) - 1, 10**8]))
    elif kind < 0.7:
        data = data[: draw.randrange(len(data) + 1)] + bytes(draw.randrange(3))
    elif kind < 0.75 and file.name in (contents.NAME, common.NAME):
        data = bytearray(
            draw.choice(
                [
                    pickle.dumps(RunsCode()),
                    b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo of 2^31 entries
                    b"\x80\x02Np2000000000\n.",
                    b"\x80\x05\x96\x00\x00\x00\x00\x02\x00\x00\x00.",  # 8 GiB of bytes
                    b"\x80\x04" + b"]" * 100_000 + b".",
                    pickle.dumps({"position": 1}),
                ]
            )
        )
    else:
        for _ in range(draw.choice([1, 1, 3, 50])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def odd(draw: random.Random, file: Path) -> None:
    """What is no regular file, or too large a one, in a file's place."""
    file.unlink()
    kind = draw.choice(["fifo", "folder", "zero", "gone", "loop", "huge"])
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind in ("zero", "loop"):
        file.symlink_to("/dev/zero" if kind == "zero" else file)
    elif kind == "huge":
        file.touch()
        os.truncate(file, 6 << 30)


def there(source: Path, run: Path) -> from_hf.Plan:
    """A conversion to a checkpoint."""
    plan = from_hf.make_plan(source, None, [], None, None, "fuzzed")
    from_hf.convert(plan, run, 1, quiet)
    return plan


def back(run: Path, out: Path) -> None:
    """And from it."""
    to_hf.convert(to_hf.make_plan(resolve(run), None, None), out, 1, quiet)


def one_directory(draw: random.Random, base: Path, folder: Path) -> str:
    """A Hugging Face directory there and back."""
    source, run, out = folder / "hf", folder / "run", folder / "out"
    shutil.copytree(base, source)
    was = json.loads((base / "config.json").read_text())
    well = draw.random() < 0.25
    changed = harmless(draw, source) if well else {}
    if not well:
        files = sorted(file for file in source.iterdir() if file.name != "LICENSE")
        for file in draw.sample(files, draw.choice([1, 1, 1, 2])):
            damage(draw, file)
    try:
        plan = there(source, run)
        back(run, out)
        inspect(source)
        verify(open_weights(source), open_weights(out), 1, quiet)
    except UserError as error:
        if well:
            raise Wrong(f"a harmless change is refused: {error}") from None
        refused(error, run, out)
        for look in (lambda: inspect(source), lambda: verify(open_weights(source), open_weights(base), 1, quiet)):
            try:
                look()
            except UserError as other:
                refused(other)
        return "directory refused"
    same(read(source), read(out))
    config = json.loads((source / "config.json").read_text(), parse_constant=float)
    if lies := [key for key in SHAPING if config.get(key) != was[key]]:
        raise Wrong(f"tensors of another shape than {lies[0]}: {config.get(lies[0])} were accepted")
    model = plan.recipe.model.model_dump()
    for key in VALID:
        if key in config and (model[key] != config[key] or not 0 < model[key] < math.inf):
            raise Wrong(f"{key}: {config[key]} was taken for {model[key]}")
    if any(model[key] != value for key, value in changed.items()):
        raise Wrong(f"{changed} became {model}")
    return "directory harmless" if well else "directory accepted"


def one_checkpoint(draw: random.Random, base: Path, original: Path, folder: Path) -> str:
    """A checkpoint of our own, as it is or as somebody wrote it who made checksums of it again."""
    run, out = folder / "run", folder / "out"
    shutil.copytree(base, run)
    step = resolve(run)
    well, signed = draw.random() < 0.15, False
    if well:
        for file in (step / checksums.NAME, step / common.FORMAT, run / "hf" / "tensors.json"):
            file.write_text(json.dumps(shuffled(draw, json.loads(file.read_text())), indent=draw.choice([None, 2])))
        # The manifest speaks of the other's bytes.
        checksums.write(step, checksums.sums(file for file in step.iterdir() if file.name != checksums.NAME))
    else:
        signed = draw.random() < 0.6
        files = [*step.iterdir(), run / "recipe.yaml", *(run / "hf").iterdir()]
        for file in draw.sample(sorted(files), draw.choice([1, 1, 2])):
            damage(draw, file)
        whole = [file for file in step.iterdir() if file.name != checksums.NAME and file.is_file()]
        if signed and all(file.stat().st_size < 1 << 30 and not file.is_symlink() for file in whole):
            shutil.rmtree(step / checksums.NAME) if (step / checksums.NAME).is_dir() else None
            (step / checksums.NAME).unlink(missing_ok=True)
            if draw.random() < 0.5:
                checksums.write(step, checksums.sums(whole))
    try:
        common.read(step)
        contents.read(step)
        inspect(run)
        back(run, out)
        verify(open_weights(out), open_weights(run), 1, quiet)
    except UserError as error:
        if well:
            raise Wrong(f"a harmless change is refused: {error}") from None
        refused(error, out)
        for look in (
            lambda: inspect(run),
            lambda: back(run, out),
            lambda: verify(*map(open_weights, (original, run)), 1, quiet),
        ):
            try:
                look()
            except UserError as other:
                refused(other)
        return "checkpoint refused"
    if not signed:
        same(read(original), read(out))
    return "checkpoint harmless" if well else "checkpoint accepted"


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Types, shapes and bytes."""
    if one.keys() != other.keys():
        raise Wrong(f"accepted, and {sorted(one.keys() ^ other.keys())[:3]} are in one of the two alone")
    for name, (dtype, shape, data) in one.items():
        if other[name][:2] != (dtype, shape) or not np.array_equal(
            np.frombuffer(data, np.uint8), np.frombuffer(other[name][2], np.uint8)
        ):
            raise Wrong(f"accepted, and {name} comes back otherwise")


def refused(error: UserError, *targets: Path) -> None:
    """One line of plain text for each fault, and nothing of a target."""
    if OBEYED.search(str(error)) or not str(error) or len(str(error)) > 20_000:
        raise Wrong(f"a refusal that is not plain text: {str(error)[:300]!r}")
    for target in targets:
        if target.name != "run" and (target.exists() or target.with_name(f"{target.name}.unfinished").exists()):
            raise Wrong(f"a refusal leaves {target.name}: {error}")
    if any(target.with_name(f"{target.name}.unfinished").exists() for target in targets):
        raise Wrong(f"a refusal leaves something unfinished: {error}")


def run(
    inputs: int, seed: int, folder: Path, keep: Path | None = None, kinds: tuple[str, ...] = (DIRECTORY, CHECKPOINT)
) -> tuple[Counter[str], list[str]]:
    """Try so many of these kinds; what came of them, and what went wrong."""
    came, wrong = Counter[str](), []
    bases = [(folder / f"base{number}", folder / f"run{number}") for number in range(3)]
    for number, ((base, converted), (fp8, shards)) in enumerate(
        zip(bases, [(True, 2), (False, 3), (False, 1)], strict=True)
    ):
        made(base, fp8, shards, number)
        there(base, converted)

    def too_long(*_: Any) -> None:
        raise Wrong(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    try:
        for number in range(inputs):
            draw, place_ = random.Random(f"{seed} {number}"), folder / f"input{number}"
            base, converted = draw.choice(bases)
            place_.mkdir()
            signal.alarm(SECONDS)
            try:
                if draw.choices(kinds, [3, 2][: len(kinds)])[0] == DIRECTORY:
                    came[one_directory(draw, base, place_)] += 1
                else:
                    came[one_checkpoint(draw, converted, base, place_)] += 1
                if MARK.exists():
                    raise Wrong("code of a file has run")
            except Exception as error:  # what is not expected is what is looked for
                came["wrong"] += 1
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                wrong.append(f"seed {seed}, input {number}: {where}: {type(error).__name__}: {error}")
                if keep:
                    shutil.copytree(place_, keep / f"{seed}-{number}", symlinks=True, ignore=_pipes)
            finally:
                signal.alarm(0)
                shutil.rmtree(place_)
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY:
                wrong.append(f"seed {seed}, input {number}: more than {MEMORY >> 30} GiB of memory")
                break
    finally:
        signal.signal(signal.SIGALRM, before)
    return came, wrong


def _pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder, name)).is_fifo() or Path(folder, name).stat().st_size > 1 << 30]


def main() -> None:
    """Print what came of the inputs; exit code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that went wrong")
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        came, wrong = run(options.inputs, options.seed, Path(folder), options.keep)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    told = ", ".join(f"{count} {what}" for what, count in sorted(came.items()))
    print(f"{options.inputs} inputs, seed {options.seed}: {told}; {time.perf_counter() - start:.0f} s, {peak:.2f} GiB")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
