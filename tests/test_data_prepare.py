"""`dsv3 data prepare`: what is in the files, whoever made them and however often it was interrupted."""

import dataclasses
import fcntl
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import zstandard

from dsv3_train.data import formats, shard
from dsv3_train.data import prepare as prepare_module
from dsv3_train.data.documents import Piece, read
from dsv3_train.data.inputs import find
from dsv3_train.data.manifest import load
from dsv3_train.data.prepare import prepare
from dsv3_train.data.show import show
from dsv3_train.data.tokenizer import Tokenizer
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Prepare
from dsv3_train.runtime import distributed
from parity import tiny

COMMAND = [sys.executable, "-m", "dsv3_cli.main", "data"]
TEXT = "a text of its own"


def words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefgh", k=draw.randrange(1, 7))) for _ in range(count))


def lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "deeper").mkdir(parents=True)
    (root / "a.txt").write_text(words(200, 1))
    (root / "deeper" / "b.py").write_text(words(300, 2))
    (root / "c.jsonl").write_bytes(lines(words(20, seed) for seed in range(100, 130)))
    (root / "d.jsonl.gz").write_bytes(gzip.compress(lines(words(20, seed) for seed in range(200, 210))))
    # Two frames one after the other, the boundary inside a line.
    raw = lines(words(20, seed) for seed in range(300, 310))
    compress = zstandard.ZstdCompressor().compress
    (root / "e.jsonl.zst").write_bytes(compress(raw[:333]) + compress(raw[333:]))
    (root / "f.txt.gz").write_bytes(gzip.compress(words(50, 4).encode()))
    (root / ".hidden").write_text("not me")
    return root


def texts_of(corpus: Path) -> list[str]:
    seeds = [*range(100, 130), *range(200, 210), *range(300, 310)]
    return [words(200, 1), words(300, 2), words(50, 4), *(words(20, seed) for seed in seeds)]


def digests(prefix: Path) -> list[str]:
    return [hashlib.sha256(Path(f"{prefix}.{end}").read_bytes()).hexdigest() for end in ("bin", "idx")]


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    if not torch.cuda.is_available():
        distributed.prepare_import("cpu")


def documents(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [document.tolist() for document in IndexedDataset(str(prefix))]


def test_every_document_once_as_megatron_reads_it(corpus, tmp_path):
    out = tmp_path / "out"
    made = prepare(Prepare(inputs=[str(corpus)], output=str(out), vocab_size=300), workers=1)
    tokenizer = Tokenizer.load(f"{out}.tokenizer.json")
    found = documents(out)
    assert all(document[-1] == tokenizer.eos_id and tokenizer.eos_id not in document[:-1] for document in found)
    texts = texts_of(corpus)
    assert sorted(tokenizer.decode(document[:-1]) for document in found) == sorted(texts)

    assert (made.counts.files, made.counts.documents, made.counts.bad) == (6, len(texts), 0)
    assert made.counts.characters == sum(map(len, texts))
    assert made.counts.tokens == sum(map(len, found))
    assert [made.sha256["bin"], made.sha256["idx"]] == digests(out)
    assert made.tokenizer.sha256 == hashlib.sha256(Path(f"{out}.tokenizer.json").read_bytes()).hexdigest()
    for source in made.inputs:
        assert source.sha256 == hashlib.sha256(Path(source.name).read_bytes()).hexdigest()
    shares = np.bincount(np.concatenate(found)) / made.counts.tokens
    entropy = -sum(share * np.log(share) for share in shares if share)
    assert made.unigram_entropy == pytest.approx(entropy)
    assert made.max_token == max(map(max, found))
    assert load(str(out)) == made
    assert sorted(path.name for path in tmp_path.glob("out*")) == [
        f"out.{end}" for end in ("bin", "idx", "manifest.json", "tokenizer.json", "tokenizer_config.json")
    ]


def test_index_is_what_megatron_writes(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from dsv3_train.data import index

    lengths = np.array([3, 1, 700, 2], np.int32)
    for dtype in (np.uint16, np.int32):
        builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
        for length in lengths:
            builder.add_item(torch.arange(length))
            builder.end_document()
        builder.finalize(str(tmp_path / "theirs.idx"))
        index.write(tmp_path / "ours.idx", np.dtype(dtype), lengths)
        assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
        found = index.read(str(tmp_path / "theirs"))
        assert (found.tokens, found.tokens_from(2), found.tokens_from(4)) == (706, 702, 0)


def test_workers_shards_and_place_change_nothing(corpus, tmp_path, monkeypatch):
    settings = {"vocab_size": 300, "fim_rate": 0.5}
    prepare(Prepare(inputs=[str(corpus)], output=str(tmp_path / "one"), **settings), workers=1)
    moved = corpus.rename(tmp_path / "moved")
    # Shards of 700 bytes cut c.jsonl in many places.
    monkeypatch.setattr(shard, "_LARGEST", 700)
    made = prepare(Prepare(inputs=[str(moved)], output=str(tmp_path / "two"), **settings), workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert 0 < made.counts.fim_documents < made.counts.documents


def test_bad_lines_are_counted_with_their_place(tmp_path, monkeypatch):
    good = [words(20, seed) for seed in range(40)]
    rows = [json.dumps({"text": text}).encode() for text in good]
    rows[3:3] = [b"{not json", b'{"body": "x"}', b'{"text": 7}', b'["text"]', b'"text"']  # lines 4 to 8
    rows[20:20] = [b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[" * 100_000]  # 21 to 23
    rows[30:30] = [b"", b'{"text": ""}']  # blank, and no text
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "y.txt").write_bytes(b"caf\xe9")
    for largest in (shard._LARGEST, 700):  # the same places however the file is divided
        monkeypatch.setattr(shard, "_LARGEST", largest)
        made = prepare(
            Prepare(
                inputs=[str(tmp_path / "*.*")],
                output=str(tmp_path / "out" / str(largest)),
                vocab_size=300,
                max_bad=0.2,
            ),
            workers=1,
        )
        assert (made.counts.documents, made.counts.bad, made.counts.empty_documents) == (40, 9, 1)
        places = {(Path(bad.file).name, bad.line): bad.reason for bad in made.bad}
        assert set(places) == {("y.txt", None), *(("x.jsonl", n) for n in (4, 5, 6, 7, 8, 21, 22, 23))}
        assert "not UTF-8 at byte 3" in places["y.txt", None]
        assert "no key 'text'" in places["x.jsonl", 5]
        assert "int" in places["x.jsonl", 6]
        assert "surrogate" in places["x.jsonl", 22]


def test_a_file_may_be_divided_anywhere(tmp_path):
    rows = ["a", "", "long line", "é" * 5, "b"]
    content = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows).encode()
    for raw in (content, content.rstrip(b"\n")):
        (tmp_path / "x.jsonl").write_bytes(raw)
        (file,) = find([str(tmp_path / "x.jsonl")])
        file = dataclasses.replace(file, format=formats.look(file.path, "text"))
        for cut in range(file.size + 1):
            pieces = Piece(file, 0, cut), Piece(file, cut, file.size)
            assert [text for piece in pieces for _, text in read(piece, "text")] == rows


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_lines_before_a_truncation_are_kept(tmp_path, suffix):
    compress = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    whole = compress(lines(words(400, seed) for seed in range(2000)))
    (tmp_path / f"x.jsonl{suffix}").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    settings = Prepare(inputs=[str(tmp_path)], output=str(out), vocab_size=300)
    with pytest.raises(UserError, match=r"cannot read 1 of 1 files to their end, .*truncated.*raise --max-bad"):
        prepare(settings, workers=1)
    assert not list(tmp_path.glob("out*"))
    made = prepare(settings.model_copy(update={"max_bad": 1.0}), workers=1)
    assert 100 < made.counts.documents < 1900
    assert made.counts.bad == 1
    assert made.bad[0].line == made.counts.documents + 1
    assert "truncated" in made.bad[0].reason
    tokenizer = Tokenizer.load(f"{out}.tokenizer.json")
    for number in (0, made.counts.documents - 1):
        assert words(400, number).startswith(tokenizer.decode(show(str(out), number).document.first_ids))


def test_given_tokenizer_and_int32(corpus, tmp_path):
    first = prepare(Prepare(inputs=[str(corpus)], output=str(tmp_path / "one"), vocab_size=300), workers=1)
    # The same tokenizer in the published spelling, with ids that do not fit 16 bits.
    raw = json.loads(Path(f"{tmp_path}/one.tokenizer.json").read_text())
    for token, (spelling, number) in zip(
        raw["added_tokens"],
        [
            ("<｜end▁of▁sentence｜>", 1),  # noqa: RUF001
            ("<｜fim▁begin｜>", 2),  # noqa: RUF001
            ("<｜fim▁hole｜>", 3),  # noqa: RUF001
            ("<｜fim▁end｜>", 70_000),  # noqa: RUF001
        ],
        strict=True,
    ):
        raw["model"]["vocab"][spelling] = raw["model"]["vocab"].pop(token["content"]) if number < 4 else number
        token.update(content=spelling, id=raw["model"]["vocab"][spelling], special=False)
    given = tmp_path / "given.json"
    given.write_text(json.dumps(raw))
    settings = Prepare(inputs=[str(corpus)], output=str(tmp_path / "two"), tokenizer=str(given), fim_rate=1.0)
    second = prepare(settings, workers=1)
    assert (first.dtype, second.dtype) == ("uint16", "int32")
    assert second.max_token == 70_000
    assert Path(f"{tmp_path}/two.tokenizer.json").read_bytes() == given.read_bytes()
    tokenizer = Tokenizer.load(given)
    for document in documents(tmp_path / "two"):
        text = tokenizer.decode(document)
        assert text.startswith("<｜fim▁begin｜>")  # noqa: RUF001
        assert text.endswith("<｜end▁of▁sentence｜>")  # noqa: RUF001
    assert tokenizer.eos_id not in tokenizer.encode("<｜end▁of▁sentence｜>")  # noqa: RUF001


def test_present_data_is_returned_at_once_or_refused(corpus, tmp_path, monkeypatch):
    settings = Prepare(inputs=[str(corpus)], output=str(tmp_path / "out"), vocab_size=300)
    made = prepare(settings, workers=1)
    before = os.stat(f"{settings.output}.bin").st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "find", None)  # the inputs are not even looked for
        assert prepare(settings, workers=1) == made
        for change in ({"vocab_size": 301}, {"fim_rate": 0.1}, {"seed": 1}, {"inputs": ["elsewhere"]}):
            with pytest.raises(UserError, match=next(iter(change))):
                prepare(settings.model_copy(update=change), workers=1)
    assert os.stat(f"{settings.output}.bin").st_mtime_ns == before
    Path(f"{settings.output}.manifest.json").unlink()
    with pytest.raises(UserError, match="without a manifest"):
        prepare(settings, workers=1)


def test_present_data_of_other_inputs(corpus, tmp_path):
    """Refused where preparing it is what was asked for; a run only needs the data."""
    settings = Prepare(inputs=[str(corpus), str(tmp_path / "x.txt")], output=str(corpus / "out"), vocab_size=300)
    (tmp_path / "x.txt").write_text(TEXT)
    made = prepare(settings, workers=1, compare=True)
    assert prepare(settings, workers=1, compare=True) == made

    def refused(*parts: str) -> None:
        with pytest.raises(UserError) as error:
            prepare(settings, workers=1, compare=True)
        message = str(error.value)
        assert message.startswith(f"{corpus / 'out'}: its inputs are not the files")
        assert "\n" not in message
        assert all(part in message for part in (*parts, "choose another output, or remove")), message
        assert prepare(settings, workers=1) == made

    (corpus / "g.txt").write_text(TEXT)
    (corpus / "h.txt").write_text(TEXT)
    refused(f"(new: {corpus / 'g.txt'} and 1 more)")
    (corpus / "g.txt").unlink()
    (corpus / "h.txt").unlink()
    (corpus / "a.txt").write_text(words(201, 1))
    (corpus / "deeper" / "b.py").unlink()
    refused(f"(gone: {corpus / 'deeper' / 'b.py'}, of another size: {corpus / 'a.txt'})")

    (corpus / "a.txt").write_text(words(200, 1))
    (corpus / "deeper" / "b.py").write_text(words(300, 2))
    (tmp_path / "x.txt").unlink()  # an input as a whole
    assert prepare(settings, workers=1, compare=True) == made


def test_inputs_are_found_once_in_an_order_of_their_own(corpus, tmp_path):
    found = find([str(corpus), str(corpus / "*.txt"), str(corpus / "a.txt")])
    assert sorted(Path(file.path).name for file in found) == sorted(
        ["a.txt", "b.py", "c.jsonl", "d.jsonl.gz", "e.jsonl.zst", "f.txt.gz"]
    )
    moved = corpus.rename(tmp_path / "moved")
    again = find([str(moved)])
    assert [os.path.relpath(file.path, corpus) for file in found] == [
        os.path.relpath(file.path, moved) for file in again
    ]


def test_python_stdlib_is_a_corpus():
    found = find(["python-stdlib"])
    names = {file.name for file in found}
    assert "python-stdlib/json/decoder.py" in names
    assert not [name for name in names if "/test/" in name or "site-packages" in name or not name.endswith(".py")]
    assert len(found) > 300


def test_packages_are_those_of_this_python(tmp_path, monkeypatch):
    for path in ("one/__init__.py", "one/data.json", "two/deep/er.py", ".hidden/no.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x = 1\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))  # purelib and platlib are often one
    names = sorted(file.name for file in find(["python-packages"]))
    assert names == ["python-packages/one/__init__.py", "python-packages/two/deep/er.py"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A dataset of 24 shards, of x.jsonl in the same directory."""
    root = tmp_path_factory.mktemp("uninterrupted")
    (root / "x.jsonl").write_bytes(lines(words(200, seed) for seed in range(3000)))
    prepare(Prepare(inputs=[str(root / "x.jsonl")], output=str(root / "out"), vocab_size=400, fim_rate=0.3), workers=1)
    return root / "out"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_and_run_again(uninterrupted, tmp_path, workers):
    source, out, parts = uninterrupted.parent / "x.jsonl", tmp_path / "out", tmp_path / "out.parts"
    arguments = ["--output", str(out), "--vocab-size", "400", "--fim-rate", "0.3", "--workers", workers]
    process = subprocess.Popen([*COMMAND, "prepare", str(source), *arguments])
    while process.poll() is None and len(list(parts.glob("0*.json"))) < 4:
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    assert bool(children) == (workers == "2")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(children, timeout=10)[1] == []  # workers notice that their parent is gone
    done = sorted(parts.glob("0*.json"))
    assert 4 <= len(done) < 24
    assert not [path for path in tmp_path.glob("out.*") if path.is_file()]
    # As if the power had gone while this one was written.
    done[1].with_suffix(".bin").write_bytes(b"torn")

    reused = []
    prepare(
        Prepare(inputs=[str(source)], output=str(out), vocab_size=400, fim_rate=0.3),
        lambda stage, bytes_done, total: reused.append(bytes_done) if stage == "tokenising" else None,
        workers=1,
    )
    assert reused[0] > 0
    assert digests(out) == digests(uninterrupted)
    assert not parts.exists()


def test_command_prints_the_manifest(corpus, tmp_path):
    out = tmp_path / "out"
    arguments = [str(corpus), "--output", str(out), "--vocab-size", "300", "--json"]
    done = subprocess.run([*COMMAND, "prepare", *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(Path(f"{out}.manifest.json").read_text())
    shown = subprocess.run(
        [*COMMAND, "show", str(out), "--document", "2", "--json"], capture_output=True, text=True, check=True
    )
    contents = json.loads(shown.stdout)
    assert contents["document"]["number"] == 2
    assert contents["document"]["first_ids"] == documents(out)[2][:100]
    assert contents["manifest"] == json.loads(done.stdout)


def test_data_that_another_run_prepares_is_waited_for(corpus, tmp_path, capsys):
    """`dsv3 data prepare` says so; runs that begin together, as those of a sweep, go on when it is there."""
    from dsv3_train.training import command, indices

    settings = Prepare(inputs=[str(corpus)], output=str(tmp_path / "out"), vocab_size=300)
    recipe = tiny(model={"vocab_size": 300}, data={"prepare": settings.model_dump(), "train": []})
    parts = tmp_path / "out.parts"
    parts.mkdir()
    with (parts / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing this dataset"):
            prepare(settings)
        waiting = [
            threading.Thread(target=work, args=(recipe,)) for work in (indices.ready_data, command._wait_for_data)
        ]
        for one in waiting:
            one.start()
        time.sleep(1.5)
        assert all(one.is_alive() for one in waiting)
        assert not (tmp_path / "out.idx").exists()
    for one in waiting:
        one.join(60)
    assert load(str(tmp_path / "out")) is not None
    assert capsys.readouterr().err.count("waiting: ") == 1
