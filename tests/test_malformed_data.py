"""Bad data ends in one line that names the fault, exit code 2, no traceback, and nothing written."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3_cli import main
from dsv3_train.data import datasets, index
from dsv3_train.data.prepare import prepare
from dsv3_train.data.tokenizer import train
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Prepare
from parity import tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture
def dsv3(capsys, monkeypatch):
    """Run `dsv3 data ...` as the installed command does; (exit code, lines on stderr)."""

    def run(*arguments: object) -> tuple[object, list[str]]:
        monkeypatch.setattr(sys, "argv", ["dsv3", "data", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main.run()
        return stop.value.code, capsys.readouterr().err.splitlines()

    return run


def no_text(root: Path) -> str:
    (root / "in").mkdir()
    (root / "in" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    return "in"


def no_file(root: Path) -> str:
    (root / "in" / "deeper").mkdir(parents=True)
    return "in"


def file(name: str, content: bytes):
    def make(root: Path) -> str:
        (root / name).write_bytes(content)
        return name

    return make


def unreadable(root: Path) -> str:
    (root / "x.txt").symlink_to("x.txt")
    return "x.txt"


NO_DOCUMENTS = {
    "missing file": (lambda root: "missing.txt", [], "missing.txt: no such file"),
    "bad glob": (lambda root: "*.text", [], "*.text: matches no file"),
    "link to itself": (unreadable, [], "x.txt: no such file"),
    "directory without files": (no_file, [], "in: holds no file"),
    "directory without text": (no_text, [], "picture.png: a PNG image"),
    "empty text": (file("x.txt", b""), [], "x.txt: no document with text"),
    "empty JSONL": (file("x.jsonl", b"\n\n"), [], "x.jsonl: no document with text"),
    "only bad lines": (file("x.jsonl", b"{1\nnull\n"), [], "x.jsonl:1: invalid JSON"),
    "wrong key": (file("x.jsonl", b'{"text": "a"}\n'), ["--text-key", "body"], "x.jsonl:1: no key 'body'"),
    "truncated gz": (file("x.txt.gz", gzip.compress(TEXT.encode())[:-9]), [], "x.txt.gz: truncated .gz data"),
    "not gz": (file("x.jsonl.gz", TEXT.encode()), [], "x.jsonl.gz: holds no .gz data"),
    "not zst": (file("x.jsonl.zst", TEXT.encode()), [], "x.jsonl.zst: holds no .zst data"),
    "tiny vocabulary": (file("x.txt", b"a"), ["--vocab-size", "100"], "vocab_size: 100 is less"),
    "no share": (file("x.txt", b"a"), ["--fim-rate", "1.5"], "--fim-rate: 1.5"),
    "two tokenizers": (file("x.txt", b"a"), ["--vocab-size", "300", "--tokenizer", "t.json"], "--vocab-size: "),
    "no tokenizer": (file("x.txt", b"a"), ["--tokenizer", "t.json"], "t.json: No such file"),
}


@pytest.mark.parametrize(("make", "options", "message"), NO_DOCUMENTS.values(), ids=NO_DOCUMENTS)
def test_prepare_refuses(dsv3, tmp_path, monkeypatch, make, options, message):
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path)
    before = sorted(os.walk(tmp_path))
    code, lines = dsv3("prepare", source, "--output", "out", "--workers", 1, *options)
    assert (code, len(lines)) == (2, 1), lines
    assert message in lines[0]
    assert sorted(os.walk(tmp_path)) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("taken", "taken: is a directory"),
        ("new/", "new/: is a directory"),
        ("x.txt/out", "x.txt/out: cannot be written"),
        ("foreign", "foreign.bin: exists without a manifest"),
    ],
)
def test_prepare_refuses_the_output(dsv3, tmp_path, monkeypatch, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text(TEXT)
    (tmp_path / "taken").mkdir()
    (tmp_path / "foreign.bin").write_bytes(b"precious")
    before = sorted(os.walk(tmp_path))
    code, lines = dsv3("prepare", "x.txt", "--output", output, "--workers", 1)
    assert (code, len(lines)) == (2, 1), lines
    assert message in lines[0]
    assert sorted(os.walk(tmp_path)) == before


def _without(*spellings: str) -> bytes:
    raw = json.loads(train([TEXT], 300))
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in spellings]
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    ("definition", "options", "message"),
    [
        (b"not json", [], "t.json: not a tokenizer.json"),
        (b"[1, 2]", [], "t.json: not a tokenizer.json"),
        (b'{"added_tokens": [], "model": {"type": "Pickle"}}', [], "t.json: not a tokenizer.json"),
        (_without("<|eos_token|>"), [], "t.json: has no special token <|eos_token|>"),
        (_without("<|fim_hole|>"), ["--fim-rate", "0.1"], "t.json: has no special token <|fim_hole|>"),
    ],
    ids=["not JSON", "not an object", "unknown model", "no end", "no FIM tokens"],
)
def test_prepare_refuses_the_tokenizer(dsv3, tmp_path, monkeypatch, definition, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text(TEXT)
    (tmp_path / "t.json").write_bytes(definition)
    code, lines = dsv3("prepare", "x.txt", "--output", "out", "--tokenizer", "t.json", "--workers", 1, *options)
    assert (code, len(lines)) == (2, 1), lines
    assert message in lines[0]
    assert not list(tmp_path.glob("out*"))


def test_fim_tokens_are_needed_for_fim_only(tmp_path):
    (tmp_path / "x.txt").write_text(TEXT)
    (tmp_path / "t.json").write_bytes(_without("<|fim_hole|>"))
    settings = Prepare(
        inputs=[str(tmp_path / "x.txt")], output=str(tmp_path / "out"), tokenizer=str(tmp_path / "t.json")
    )
    assert prepare(settings, workers=1).counts.documents == 1


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A dataset of 50 documents, vocabulary 300, to be damaged in copies."""
    root = tmp_path_factory.mktemp("sound")
    (root / "x.jsonl").write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(50)))
    prepare(Prepare(inputs=[str(root / "x.jsonl")], output=str(root / "out"), vocab_size=300), workers=1)
    return root


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    for path in sound.glob("out.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / "out"


def recipe(prefix: Path, **data):
    data = {"train": [{"path": str(prefix)}], **data}
    return tiny(model={"vocab_size": 300}, training={"sequence_length": 32}, data=data)


def cut(name: str, keep: int | None = None, less: int = 0):
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.{name}")
        path.write_bytes(path.read_bytes()[: keep if keep is not None else -less])

    return damage


def patch(at: int, value: bytes):
    def damage(prefix: Path) -> None:
        with open(f"{prefix}.idx", "r+b") as stream:
            stream.seek(at)
            stream.write(value)

    return damage


def no_documents(prefix: Path) -> None:
    Path(f"{prefix}.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 0, 1) + bytes(8))
    Path(f"{prefix}.bin").write_bytes(b"")


DAMAGE = {
    "no index": (lambda prefix: os.remove(f"{prefix}.idx"), ".idx: no such file"),
    "no tokens": (lambda prefix: os.remove(f"{prefix}.bin"), ".bin: no such file"),
    "index cut in the header": (cut("idx", keep=20), ".idx: truncated, 20 bytes"),
    "index cut": (cut("idx", less=100), ".idx: truncated"),
    "index empty": (cut("idx", keep=0), ".idx: no index of a dataset"),
    "index too long": (lambda prefix: os.truncate(f"{prefix}.idx", 10**5), ".idx: too long"),
    "tokens cut": (cut("bin", less=2), ".bin: "),
    "wrong magic": (patch(0, b"PK\x03\x04"), ".idx: no index of a dataset"),
    "wrong version": (patch(9, b"\x07"), ".idx: version 7"),
    "unknown type": (patch(17, b"\x63"), ".idx: version 1, token type 99"),
    "absurd count": (patch(18, b"\xff" * 8), ".idx: 18446744073709551615 documents"),
    "no documents": (no_documents, ".idx: holds no document"),
    "manifest is no JSON": (
        lambda prefix: Path(f"{prefix}.manifest.json").write_text("{"),
        ".manifest.json: not a manifest",
    ),
    "tokenizer is no JSON": (cut("tokenizer.json", less=50), ".tokenizer.json: not a tokenizer.json"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_datasets(dsv3, copy, damage, message):
    datasets.check(recipe(copy))
    damage(copy)
    with pytest.raises(UserError) as error:
        datasets.check(recipe(copy))
    assert len(str(error.value).splitlines()) == 1
    assert f"{copy}{message}" in str(error.value)
    code, lines = dsv3("show", copy)
    assert (code, len(lines)) == (2, 1), lines
    assert f"{copy}{message}" in lines[0]


def test_show_reads_the_whole_index(dsv3, copy):
    patch(34 + 4 * 7, struct.pack("<i", 1))(copy)  # the length of document 7: the last offset and all sizes still agree
    code, lines = dsv3("show", copy)
    assert (code, len(lines)) == (2, 1)
    assert "contradict" in lines[0]


def test_show_knows_its_documents(dsv3, copy):
    code, lines = dsv3("show", copy, "--document", 50)
    assert (code, lines) == (2, [f"--document: {copy} has documents 0 to 49, not 50"])


def other_tokenizer(sound: Path, root: Path) -> Path:
    settings = Prepare(inputs=[str(sound / "x.jsonl")], output=str(root / "other"), vocab_size=280)
    prepare(settings, workers=1)
    return root / "other"


def test_check_compares_vocabularies(sound, tmp_path):
    prefix, other = sound / "out", other_tokenizer(sound, tmp_path)

    def fault(recipe) -> str:
        with pytest.raises(UserError) as error:
            datasets.check(recipe)
        return str(error.value)

    small = recipe(prefix).model_copy(update={"model": recipe(prefix).model.model_copy(update={"vocab_size": 290})})
    assert "has 300 tokens, but model.vocab_size is 290" in fault(small)
    message = fault(recipe(prefix, valid=[{"path": str(other)}]))
    assert message.startswith(f"data.valid[0]: {other}: was made with another tokenizer")
    message = fault(recipe(prefix, tokenizer=f"{other}.tokenizer.json"))
    assert message.startswith(f"data.train[0]: {prefix}: was made with another tokenizer")
    assert "missing.json" in fault(recipe(prefix, tokenizer="missing.json"))
    message = fault(recipe(prefix, valid=[{"path": str(sound / ".." / sound.name / "out")}]))
    assert message.startswith("data.valid[0]: ")
    assert "is data.train[0] too" in message
    datasets.check(recipe(prefix, tokenizer=f"{prefix}.tokenizer.json"))


def test_check_names_every_fault(sound, tmp_path):
    both = {"train": [{"path": "missing"}, {"path": str(sound / "out")}, {"path": "gone"}]}
    with pytest.raises(UserError) as error:
        datasets.check(tiny(model={"vocab_size": 300}, data=both))
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == ["data.train[0]", "data.train[2]"]
    with pytest.raises(UserError, match=r"data\.train: names no dataset"):
        datasets.check(tiny())


def test_check_wants_one_sequence(tmp_path):
    lengths = np.array([30, 3], np.int32)
    index.write(tmp_path / "a.idx", np.dtype(np.uint16), lengths)
    np.zeros(33, np.uint16).tofile(tmp_path / "a.bin")
    datasets.check(recipe(tmp_path / "a", valid_fraction=0.0))
    with pytest.raises(UserError, match="30 tokens, one sequence takes 33"):
        datasets.check(recipe(tmp_path / "a", valid_fraction=0.5))
    shorter = {"training": {"sequence_length": 8, "eval_interval": 1}, "model": {"vocab_size": 300}}
    data = {"train": [{"path": str(tmp_path / "a")}], "valid_fraction": 0.5}
    with pytest.raises(UserError, match="3 tokens, a validation sequence takes 9"):
        datasets.check(tiny(**shorter, data=data))


CHECK = """
import json, sys
from dsv3_train.data import datasets
from dsv3_train.recipe.schema import Recipe
datasets.check(Recipe.model_validate_json(sys.argv[1]))
import dsv3_train.data.prepare, dsv3_train.data.show
print("torch" in sys.modules)
"""


def test_neither_check_nor_prepare_loads_torch(sound):
    arguments = [sys.executable, "-c", CHECK, recipe(sound / "out").model_dump_json()]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_one_at_a_time(dsv3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text(TEXT)
    (tmp_path / "out.parts").mkdir()
    with open(tmp_path / "out.parts" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, lines = dsv3("prepare", "x.txt", "--output", "out", "--workers", 1)
    assert (code, len(lines)) == (2, 1)
    assert "out.parts: another process is preparing this dataset" in lines[0]
    assert (tmp_path / "out.parts" / "lock").exists()  # the other one's
