"""Lines of a file from its end, whatever blocks it is read in."""

import json

import pytest

from dsv3_train import lines
from dsv3_train.lines import newest_first


@pytest.mark.parametrize("block", [1, 7, 16, 1 << 20])
@pytest.mark.parametrize("end", ["", '{"step": 9, "lo', "7\n", "\n"], ids=["whole", "cut short", "no object", "empty"])
def test_every_line_once_at_its_place(tmp_path, monkeypatch, block, end):
    monkeypatch.setattr(lines, "_BLOCK", block)
    texts = [json.dumps({"step": step, "text": "ä" * (3 * step % 11)}, ensure_ascii=False) + "\n" for step in range(8)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join([*texts, end]), encoding="utf-8")
    found = list(newest_first(path))
    if end:
        assert found.pop(0) == (len("".join(texts).encode()), None)
    assert [line["step"] for _, line in found] == [7, 6, 5, 4, 3, 2, 1, 0]
    written = path.read_bytes()
    for at, line in found:
        assert json.loads(written[at:].split(b"\n")[0]) == line


def test_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert list(newest_first(tmp_path / "metrics.jsonl")) == []
