"""What options, environment and files come to through the command line: in this process, without training."""

from __future__ import annotations

import filecmp
import json
import os
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_launcher import OPEN_MPI, SRUN, less
from test_tokenizer import KIMI

import hf_models
from dsv3_cli import main
from dsv3_train.runtime import launcher
from dsv3_train.training import command

Said = tuple[int, str, str]
"""Exit code, stdout, stderr."""


@pytest.fixture
def dsv3(monkeypatch, capsys, tmp_path) -> Callable[..., Said]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "end_when_asked", lambda: None)  # this process is pytest's

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["dsv3", *arguments])
        with pytest.raises(SystemExit) as stop:
            main.run()
        return (stop.value.code or 0, *capsys.readouterr())

    return run


def refused(said: Said, *parts: str) -> None:
    code, _, told = said
    assert code == 2, told
    assert len(told.strip().splitlines()) == 1, told
    assert all(part in told for part in parts), told


def test_conversion_tells_what_it_found(dsv3, tmp_path):
    """The rules of FP8 scales, what is left out, what will not come back: at from-hf; and the bytes at to-hf."""
    hf_models.plain(tmp_path / "hf")
    hf_models.to_fp8(tmp_path / "hf", 1, lambda block, name: 1.1 * block.abs().max() / 448)
    contents = hf_models.tensors(tmp_path / "hf")
    contents["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    hf_models.rewrite(tmp_path / "hf", contents)
    code, _, told = dsv3("convert", "from-hf", "hf", "run", "--workers", "1")
    assert code == 0, told
    assert "FP8 scales are kept" in told
    assert "1 frequencies of RoPE" in told
    assert dsv3("convert", "to-hf", "run", "back", "--workers", "1")[0] == 0
    assert filecmp.cmp("hf/model.safetensors", "back/model.safetensors", shallow=False)

    lost = "model.layers.0.self_attn.o_proj.weight"
    contents[f"{lost}_scale_inv"].fill_(1e-44)
    hf_models.rewrite(tmp_path / "hf", contents)
    told = dsv3("convert", "from-hf", "hf", "again", "--workers", "1")[2]
    assert any("not come back byte for byte" in line and lost in line for line in told.splitlines())


def test_more_unreadable_documents_on_request(dsv3, tmp_path):
    rows = [json.dumps({"text": f"Document number {number}"}) for number in range(50)]
    (tmp_path / "x.jsonl").write_text("\n".join([*rows, "{"]))
    prepare = ["data", "prepare", "x.jsonl", "--output", "new/x", "--vocab-size", "300", "--workers", "1"]
    refused(dsv3(*prepare), "cannot read 1 of 51 documents", "--max-bad")
    assert not (tmp_path / "new").exists()
    refused(dsv3(*prepare, "--max-bad", "2"), "--max-bad: 2 ")
    assert dsv3(*prepare, "--max-bad", "0.05")[0] == 0


def test_another_end_of_a_document(dsv3, tmp_path):
    (tmp_path / "x.txt").write_text("some text")
    (tmp_path / "t.json").write_bytes(KIMI)
    prepare = ["data", "prepare", "x.txt", "--output", "x", "--workers", "1"]
    refused(dsv3(*prepare, "--tokenizer", "t.json"), "t.json: ", "--eos-token", "[EOS]")
    refused(dsv3(*prepare, "--eos-token", "[EOS]"), "--eos-token: ")
    assert dsv3(*prepare, "--tokenizer", "t.json", "--eos-token", "[EOS]")[0] == 0
    assert np.fromfile("x.bin", np.uint16)[-1] == 1


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: not set"),
        (less(SRUN, "SLURM_STEP_ID"), "SLURM_STEP_ID: not set"),  # task 3 of 4, which must not train alone
        ({**SRUN, "MASTER_ADDR": "[n0]:1"}, "MASTER_ADDR: "),
        (OPEN_MPI, "parallel.world_size: the recipe says 1, but 2 processes were started (mpirun)"),
    ],
)
def test_a_launcher_that_is_not_understood(dsv3, tmp_path, monkeypatch, environment, named):
    monkeypatch.setattr(os, "environ", {**less(dict(os.environ), *launcher.VARIABLES), **environment})
    refused(dsv3("train", "smoke", "data.prepare=null", "data.train=[{path: x}]"), named)
    assert list(tmp_path.iterdir()) == []
