"""What an input file is, is seen in its content; what cannot be read or spelled is refused, with nothing written."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

from dsv3_train.data import compression, documents, formats
from dsv3_train.data.formats import Format
from dsv3_train.data.prepare import prepare
from dsv3_train.data.tokenizer import SPELLINGS, Tokenizer, train
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Prepare

TEXTS = [f"Document number {i} about nothing in particular." for i in range(20)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
PACK = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress, ".bz2": bz2.compress, ".xz": lzma.compress}
TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def parquet(column: arrow.Array, name: str = "text") -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(arrow.table({name: column, "id": list(range(len(column)))}), out)
    return out.getvalue()


def settings(root: Path, **more) -> Prepare:
    return Prepare(inputs=[str(root / "in")], output=str(root / "new" / "out"), vocab_size=300, **more)


def made(root: Path, name: str, content: bytes, **more) -> list[str]:
    """The texts of the dataset of one file."""
    (root / "in").mkdir(exist_ok=True)
    (root / "in" / name).write_bytes(content)
    asked = settings(root, **more)
    prepare(asked, workers=1)
    from dsv3_train.data import index

    found, tokenizer = index.read(asked.output), Tokenizer.load(f"{asked.output}.tokenizer.json")
    raw = Path(f"{asked.output}.bin").read_bytes()
    pieces = [raw[o : o + 2 * n] for o, n in zip(found.offsets.tolist(), found.lengths.tolist(), strict=True)]
    return [tokenizer.decode(memoryview(piece).cast("H").tolist()[:-1]) for piece in pieces]


READ = {
    "upper case": ("corpus.JSONL", LINES),
    "no suffix": ("part-00000", LINES),
    "text by name": ("corpus.txt", LINES),
    "table by name": ("corpus.tsv", LINES),
    "byte order mark": ("corpus.dat", b"\xef\xbb\xbf" + LINES),
    "compression unnamed": ("corpus.jsonl", gzip.compress(LINES)),
    **{f"only {suffix}": (f"corpus{suffix}", pack(LINES)) for suffix, pack in PACK.items()},
    **{f"upper case {suffix}": (f"corpus.JSONL{suffix.upper()}", pack(LINES)) for suffix, pack in PACK.items()},
    "Parquet": ("corpus.parquet", parquet(arrow.array(TEXTS))),
    "Parquet unnamed": ("part-00000", parquet(arrow.array(TEXTS, arrow.large_string()))),
    "Parquet of a dictionary": ("x.snappy.parquet", parquet(arrow.array(TEXTS).dictionary_encode())),
    "members": ("corpus.jsonl.gz", gzip.compress(LINES[:333]) + gzip.compress(LINES[333:])),
    "zeros after the last member": ("corpus.jsonl.gz", gzip.compress(LINES) + bytes(70_000)),
    "zeros between members": ("c.jsonl.gz", gzip.compress(LINES[:333]) + bytes(512) + gzip.compress(LINES[333:])),
    "padding of xz": ("corpus.jsonl.xz", lzma.compress(LINES) + bytes(8)),
}


@pytest.mark.parametrize(("name", "content"), READ.values(), ids=READ)
def test_documents_whatever_the_name(tmp_path, name, content):
    assert made(tmp_path, name, content) == TEXTS


@pytest.mark.parametrize("name", ["notes.txt", "settings", "code.py", "notes.md"])
def test_text_stays_text(tmp_path, name):
    text = '{"colour": "red"}\nfor the car\n' if name != "settings" else "a\tb\nno table\n"
    assert made(tmp_path, name, text.encode()) == [text]


def tar(content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("x.txt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def zipped(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x.txt", content)
    return out.getvalue()


REFUSED = {
    "tsv": ("x.tsv", b"id\ttext\n1\thello\n", "a table of columns between tabs"),
    "csv": ("x.csv", b"id,text\n1,hello\n", "a table of columns between commas"),
    "tsv unnamed": ("part-0", b"id\ttext\n1\thello\n2\tyou\n", "looks like a table"),
    "pretty": ("x.json", json.dumps([{"text": text} for text in TEXTS], indent=1).encode(), "over several lines"),
    "other key": ("part-0", LINES.replace(b"text", b"content"), "no key 'text' (text is in 'content'; see --text-key)"),
    "tar": ("x.tar", tar(TEXT.encode()), "a tar archive; unpack it"),
    "tar.gz": ("x.tar.gz", gzip.compress(tar(TEXT.encode())), "a tar archive; unpack it"),
    "zip": ("x.jsonl", zipped(LINES), "a zip archive; unpack it"),
    "twice": ("x.jsonl.gz", gzip.compress(gzip.compress(LINES)), "compressed twice"),
    "UTF-16": ("x.txt", TEXT.encode("utf-16"), "UTF-16"),
    "UTF-16 without mark": ("x.txt", TEXT.encode("utf-16-le"), "binary data, or text that is not UTF-8"),
    "not gz": ("x.gz", LINES, "holds no .gz data"),
    "no Parquet": ("x.parquet", LINES, "holds no Parquet"),
    "cut Parquet": ("x.parquet", parquet(arrow.array(TEXTS))[:-300], "damaged Parquet"),
    "Parquet of numbers": ("x.parquet", parquet(arrow.array([1, 2])), "column 'text' holds int64, not strings"),
    "Parquet of others": ("x.parquet", parquet(arrow.array(TEXTS), "body"), "no column 'text' (it has body, id"),
    "damaged in the middle": ("x.jsonl.bz2", bz2.compress(LINES)[:90] + bytes(40), "damaged .bz2 data"),
    "truncated xz": ("x.jsonl.xz", lzma.compress(LINES)[:-20], "truncated .xz data"),
    "more behind": ("x.jsonl.gz", gzip.compress(LINES) + b"more", "damaged .gz data"),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_contradictions_are_refused(tmp_path, name, content, message):
    (tmp_path / "in").mkdir()
    before = sorted(os.walk(tmp_path))
    with pytest.raises(UserError) as error:
        made(tmp_path, name, content)
    assert message in str(error.value), error.value
    assert "\n" not in str(error.value)
    os.remove(tmp_path / "in" / name)
    assert sorted(os.walk(tmp_path)) == before


def test_parquet_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"x\.parquet: reading Parquet needs pyarrow; pip install 'dsv3-train\[parquet\]'"
    ):
        made(tmp_path, "x.parquet", parquet(arrow.array(TEXTS)))


def test_rows_without_text(tmp_path):
    column = arrow.array([*TEXTS, None, ""])
    assert made(tmp_path, "x.parquet", parquet(column), max_bad=0.1) == TEXTS
    found = json.loads((tmp_path / "new" / "out.manifest.json").read_text())
    assert (found["counts"]["bad"], found["counts"]["empty_documents"]) == (1, 1)
    assert found["bad"][0]["line"] == 21


def test_more_than_may_be_unreadable(tmp_path):
    """By the whole run's count; the limit itself is not over it."""
    rows = [json.dumps({"text": f"{i} {TEXT}"}) for i in range(2000)]
    rows[::100] = ["{"] * 20
    content = "\n".join(rows).encode()
    assert len(made(tmp_path, "x.jsonl", content)) == 1980
    for path in (tmp_path / "new").iterdir():
        path.unlink()
    (tmp_path / "new").rmdir()
    rows[50] = '{"txt": "a"}'
    with pytest.raises(
        UserError,
        match=r"cannot read 21 of 2000 documents, more than the allowed share of 0\.01; .*x\.jsonl:1: .*-bad",
    ):
        made(tmp_path, "x.jsonl", "\n".join(rows).encode())
    assert not (tmp_path / "new").exists()
    assert len(made(tmp_path, "x.jsonl", "\n".join(rows).encode(), max_bad=0.02)) == 1979


def test_one_file_of_many_that_ends_early(tmp_path):
    """It is one fault, and nobody knows of how many documents."""
    (tmp_path / "in").mkdir()
    for number in range(9):
        (tmp_path / "in" / f"{number}.jsonl.gz").write_bytes(gzip.compress(LINES * 20))
    with pytest.raises(UserError, match="cannot read 1 of 10 files to their end"):
        made(tmp_path, "9.jsonl.gz", gzip.compress(LINES * 20)[:-50])


def lossy(kind: str) -> bytes:
    special = [first for first, _ in SPELLINGS.values()]
    if kind == "lower case":
        definition = json.loads(train(TEXTS, 300))
        definition["normalizer"] = {"type": "Lowercase"}
        return json.dumps(definition).encode()
    words = {word: number for number, word in enumerate([*special, "<unk>"])}
    one = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    one.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    one.add_special_tokens(special)
    return one.to_str().encode()


@pytest.mark.parametrize("kind", ["lower case", "unknown words"])
def test_a_tokenizer_that_loses_text(tmp_path, kind):
    (tmp_path / "t.json").write_bytes(lossy(kind))
    with pytest.raises(UserError, match=r"t\.json: loses \d+ of \d+ characters of .*give one without loss"):
        made(tmp_path, "x.jsonl", LINES, tokenizer=str(tmp_path / "t.json"))
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_that_loses_what_no_sample_saw(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_train.data.quality._PLACES", 1)
    monkeypatch.setattr("dsv3_train.data.shard._CHECKED_EVERY", 1)
    (tmp_path / "t.json").write_bytes(lossy("lower case"))
    rows = [json.dumps({"text": "only small letters"})] * 10 + [json.dumps({"text": "LARGE ONES"})] * 10
    with pytest.raises(UserError, match="loses 90 of 280 characters"):
        made(tmp_path, "x.jsonl", "\n".join(rows).encode(), tokenizer=str(tmp_path / "t.json"))


def test_a_token_beyond_any_tokenizer(tmp_path):
    definition = json.loads(train(TEXTS, 300))
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": 10**9, "content": "<x>"})
    definition["model"]["vocab"]["<x>"] = 10**9
    (tmp_path / "t.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match="token 1000000000 is beyond any tokenizer"):
        made(tmp_path, "x.jsonl", LINES, tokenizer=str(tmp_path / "t.json"))


@pytest.mark.parametrize("suffix", PACK)
def test_bombs_unfold_in_small_pieces(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(compression, "_BOMB_BYTES", 300 << 20)
    (tmp_path / "x").write_bytes(PACK[suffix](bytes(1 << 24)) * 24)  # members or frames of 16 MiB
    sizes = []
    with open(tmp_path / "x", "rb") as stream:
        unfolding = compression.chunks(stream, suffix)
        with pytest.raises(compression.Damaged, match="over 500 times its size"):
            sizes.extend(map(len, unfolding))
    assert max(sizes) <= 64 << 20
    assert sum(sizes) > 250 << 20


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_that_is_too_long_costs_that_line(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(documents, "LONGEST_LINE", 1000)
    rows = [*TEXTS[:10], "x" * 5000, *TEXTS[10:], "x" * 5000]
    content = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    name = f"x.jsonl{suffix}"
    assert made(tmp_path, name, gzip.compress(content) if suffix else content, max_bad=0.2) == TEXTS
    found = json.loads((tmp_path / "new" / "out.manifest.json").read_text())
    assert [bad["line"] for bad in found["bad"]] == [11, 22]


def test_lone_objects_are_settings_of_programs(tmp_path):
    for name, expected in {"a.map": "text", "part-0": "lines", "x.json": "lines"}.items():
        (tmp_path / name).write_text('{"version": 3}\n')
        assert formats.look(str(tmp_path / name), "text") == Format(expected)


FOREIGN = {
    "files": lambda parts: (parts.mkdir(), (parts / "thesis.txt").write_text("years of work")),
    "directories": lambda parts: (parts / "lock").mkdir(parents=True),
    "link": lambda parts: ((parts.parent / "mine").mkdir(), parts.symlink_to("mine")),
    "link in it": lambda parts: (parts.mkdir(), (parts / "lock").symlink_to(parts.parent / "precious")),
    "file": lambda parts: parts.write_text("years of work"),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_has_the_name_of_our_parts_stays(tmp_path, make):
    parts = tmp_path / "out.parts"
    (tmp_path / "x.jsonl").write_bytes(LINES)
    (tmp_path / "precious").write_text("years of work")
    make(parts)
    before = sorted((path, path.is_file() and path.read_text()) for path in tmp_path.rglob("*"))
    asked = Prepare(inputs=[str(tmp_path / "x.jsonl")], output=str(tmp_path / "out"), vocab_size=300)
    with pytest.raises(UserError, match=r"out\.parts: .* move it away, or choose another output"):
        prepare(asked, workers=1)
    assert sorted((path, path.is_file() and path.read_text()) for path in tmp_path.rglob("*")) == before


def test_an_empty_directory_that_was_there_stays(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(LINES)
    (tmp_path / "out.parts").mkdir()
    prepare(Prepare(inputs=[str(tmp_path / "x.jsonl")], output=str(tmp_path / "out"), vocab_size=300), workers=1)
    assert list((tmp_path / "out.parts").iterdir()) == []
