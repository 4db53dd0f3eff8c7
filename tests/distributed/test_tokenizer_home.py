"""RUN/tokenizer: made when a run begins, carried on and out, compared; what transformers makes of it."""

from __future__ import annotations

import contextlib
import filecmp
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

import hf_models
from dsv3_cli.generate import generate
from dsv3_train.checkpoint import tokenizer_home
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import from_hf, origin, to_hf
from dsv3_train.data import tokenizer
from dsv3_train.data.prepare import prepare
from dsv3_train.data.special_tokens import FILES
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import dump, load
from dsv3_train.recipe.schema import Prepare, Recipe
from dsv3_train.runtime import distributed
from parity import in_processes, tiny

transformers = pytest.importorskip("transformers")

SOURCES = str(Path(__file__).parents[2] / "dsv3_train" / "recipe")


def trained(recipe: Recipe) -> Path:
    """Train as `dsv3 train` does, in a process of its own."""

    def on_rank() -> None:
        from dsv3_train.training.indices import ready_data
        from dsv3_train.training.run import Run
        from dsv3_train.training.rundir import open_run_dir
        from dsv3_train.training.startup import Startup

        ready_data(recipe)
        notes = open_run_dir(recipe.run_dir, recipe, dump(recipe), {})
        notes += tokenizer_home.keep(recipe.run_dir, recipe)
        distributed.start(recipe, "cpu")
        Run(recipe, recipe.run_dir, "cpu", Startup(), notes).train()
        distributed.stop()

    in_processes(on_rank, 1)
    return recipe.run_dir


def convert_in(source: Path, target: Path) -> Path:
    from_hf.convert(from_hf.make_plan(source, None, [], None, None, "small"), target, 1, lambda *_: None)
    return target


def convert_out(run: Path, target: Path) -> Path:
    to_hf.convert(to_hf.make_plan(resolve(run), None, None), target, 1, lambda *_: None)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name in FILES}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("data")
    for name, size in (("own", 400), ("other", 380)):
        prepare(Prepare(inputs=[SOURCES], output=str(where / name), vocab_size=size), workers=1)
    distributed.prepare_import("cpu")
    import dsv3_train.training.run  # noqa: F401  once, before forking

    return where


def settings(
    run_dir: Path, data: Path, steps: int = 1, name: str = "own", valid: tuple[str, ...] = (), **changes: dict
) -> Recipe:
    sets = {"train": [{"path": str(data / name)}], "valid": [{"path": str(data / other)} for other in valid]}
    return tiny(
        model={"vocab_size": 512},
        training={"duration": f"{steps} steps", "eval_interval": 0},
        logging={"tensorboard": False},
        runtime={"run_dir": str(run_dir)},
        data={**sets, "workers": 0},
        **changes,
    )


@pytest.fixture(scope="module")
def run(data) -> Path:
    return trained(settings(data / "run", data))


def test_transformers_asks_a_model_trained_here(run, data, tmp_path):
    """AutoTokenizer has the run's end of a document for all ends; one prompt and a padded batch are continued."""
    out = convert_out(run, tmp_path / "out")
    assert contents(out) == contents(run / "tokenizer")
    assert filecmp.cmp(out / "tokenizer.json", data / "own.tokenizer.json", shallow=False)
    asked = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    ends = (asked.bos_token_id, asked.eos_token_id, asked.pad_token_id)
    assert ends == (0, 0, 0)
    assert {getattr(model.generation_config, f"{role}_token_id") for role in ("bos", "eos", "pad")} == {0}
    assert {getattr(model.config, f"{role}_token_id") for role in ("bos", "eos", "pad")} == {0}
    own = tokenizer.Tokenizer.load(run / "tokenizer")
    assert asked("def main(")["input_ids"] == own.encode("def main(")
    batch = asked(["def main(", "x"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    model.generate(**batch, max_new_tokens=2)
    with torch.no_grad():  # whatever it would say: the next token is the end
        model.lm_head.weight.zero_()
    assert model.generate(**asked("def main(", return_tensors="pt"), max_new_tokens=5)[0].tolist()[-1] == 0


def test_a_run_from_before_gets_its_directory(run, data, tmp_path):
    """At its first resume, with one line; its checkpoints of then have no sha256."""
    old = tmp_path / "old"
    shutil.copytree(run, old)
    shutil.rmtree(old / "tokenizer")
    common = resolve(old) / "common.pt"
    small = torch.load(common)
    (sha256,) = {small.pop("tokenizer"), tokenizer.Tokenizer.load(data / "own.tokenizer.json").sha256}
    torch.save(small, common)
    assert tokenizer_home.recorded(resolve(old)) is None
    (resolve(old) / "checksums.json").unlink(missing_ok=True)
    trained(settings(old, data, 2, checkpoint={"verify": False}))
    assert contents(old / "tokenizer") == contents(run / "tokenizer")
    log = (old / "log.txt").read_text()
    assert log.count(f"{old}/tokenizer: made from {data / 'own.tokenizer.json'}") == 1
    assert tokenizer_home.recorded(resolve(old)) == sha256


def test_another_tokenizer_is_refused(run, data, tmp_path, capfd):
    """By a resume, by a run that begins from it, with another dataset, and where the directory itself is another's."""
    own, other = settings(run, data), settings(run, data, name="other")
    assert tokenizer_home.find_checked(run, own).place == run / "tokenizer"
    message = "another tokenizer than .*run/tokenizer, which this model has"
    with pytest.raises(UserError, match=message):
        tokenizer_home.find_checked(run, other)
    begins = {"checkpoint": {"load": str(run)}}
    assert tokenizer_home.find_checked(tmp_path / "new", settings(tmp_path / "new", data, **begins)).place.parent == run
    with pytest.raises(UserError, match=message):
        tokenizer_home.find_checked(tmp_path / "new", settings(tmp_path / "new", data, name="other", **begins))
    with pytest.raises(UserError, match=r"other: was made with another tokenizer than .*run/tokenizer"):
        tokenizer_home.find_checked(run, settings(run, data, valid=("other",)))
    replaced = tmp_path / "replaced"
    shutil.copytree(run, replaced)
    shutil.copy(data / "other.tokenizer.json", replaced / "tokenizer" / "tokenizer.json")
    with pytest.raises(UserError, match="was trained with the tokenizer of sha256"):
        to_hf.make_plan(resolve(replaced), None, None)
    with pytest.raises(AssertionError):
        trained(settings(replaced, data, 2, name="other"))
    assert "step_00000001: was trained with the tokenizer of sha256" in capfd.readouterr().err


def test_one_end_of_a_document(data, tmp_path):
    """That of data.eos_token goes into the configuration; data whose documents end otherwise is refused."""
    where = tmp_path / "hf"
    where.mkdir()
    (where / "tokenizer.json").write_bytes((data / "own.tokenizer.json").read_bytes())
    (where / "tokenizer_config.json").write_text('{"eos_token": "<|fim_end|>", "model_max_length": 9}')
    run_dir = tmp_path / "run"
    begins = {"checkpoint": {"load": f"hf:{where}"}}
    with pytest.raises(UserError, match=r"own: its documents end with token 0, and by .*/hf with 3"):
        tokenizer_home.find_checked(run_dir, settings(run_dir, data, **begins))
    recipe = settings(run_dir, data, **begins)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eos_token": "<|eos_token|>"})})
    assert tokenizer_home.find_checked(run_dir, recipe).tokenizer.eos_id == 0
    assert tokenizer_home.keep(run_dir, recipe) == []
    said = json.loads((run_dir / "tokenizer" / "tokenizer_config.json").read_text())
    assert (said["eos_token"], said["pad_token"], said["model_max_length"]) == ("<|eos_token|>", "<|eos_token|>", 9)


def test_the_directory_goes_with_the_run(run, data, tmp_path):
    """To a run that begins from it, whose source is gone later; data at the old path may be another's by then."""
    shutil.copytree(run, tmp_path / "first")
    recipe = settings(tmp_path / "second", data, checkpoint={"load": str(tmp_path / "first")})
    trained(recipe)
    shutil.rmtree(tmp_path / "first")
    assert contents(tmp_path / "second" / "tokenizer") == contents(run / "tokenizer")
    gone = settings(tmp_path / "second", tmp_path / "nothing")
    assert tokenizer_home.find(tmp_path / "second", gone).tokenizer.eos_id == 0


def moonlight(where: Path, **added: bytes) -> Path:
    """A directory whose vocabulary is read by code, as Moonlight's and Kimi-K2's (facts of the latter)."""
    hf_models.save(where, vocab_size=512)
    ends = {"120": {"content": "[BOS]", "special": True}, "121": {"content": "[EOS]", "special": True}}
    settings = {"added_tokens_decoder": ends, "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    code = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
    files = {
        "tokenizer_config.json": json.dumps({**settings, **code}).encode(),
        "generation_config.json": b'{"max_length": 131072, "eos_token_id": 122}',
        "tiktoken.model": b"IQ== 0\n",
        "tokenization_kimi.py": b"raise SystemExit('this code was run')\n",
        "chat_template.jinja": b"{{ 1 / 0 }}",
    }
    for name, content in {**files, **added}.items():
        (where / name).write_bytes(content)
    return where


def test_a_vocabulary_that_code_reads(tmp_path):
    """Its files go in and out untouched, the code is not run, generation takes ids, text wants a tokenizer.json."""
    source = moonlight(tmp_path / "hf")
    run = convert_in(source, tmp_path / "run")
    back = convert_out(run, tmp_path / "back")
    names = sorted(file.name for file in source.iterdir())
    assert names == sorted(file.name for file in back.iterdir())
    assert all(filecmp.cmp(source / name, back / name, shallow=False) for name in names)
    home = tokenizer_home.find(run, load(str(run / "recipe.yaml")))
    assert (home.sha256, home.stops) == (None, {121, 122})
    with pytest.raises(UserError, match=r"run/tokenizer: has no tokenizer\.json, .* set data\.tokenizer"):
        generate(str(run), prompt="def ")
    named = tmp_path / "named" / "tokenizer.json"
    named.parent.mkdir()
    named.write_bytes(tokenizer.train(["def f(x): return x"] * 9, 300).replace(b"<|eos_token|>", b"[EOS]"))
    at_hand = load(str(run / "recipe.yaml"), [f"data.tokenizer={named}"])
    assert tokenizer_home.find(run, at_hand).tokenizer.eos_id == 0

    said = tmp_path / "said.json"

    def ids() -> None:
        with said.open("w") as file, contextlib.redirect_stdout(file):
            generate(str(run), ids="120,5 7", max_tokens=3, temperature=0.0, as_json=True)

    process = multiprocessing.get_context("fork").Process(target=ids)
    process.start()
    process.join()
    report = json.loads(said.read_text())
    # Not from_pretrained: in a process with Megatron-core's CPU patches it leaves RoPE's frequencies uninitialised.
    model = hf_models.reference(vocab_size=512)
    expected = model.generate(torch.tensor([[120, 5, 7]]), max_new_tokens=3, do_sample=False)[0].tolist()
    assert (report["prompt"], report["ids"], report["text"]) == ([120, 5, 7], expected[3:], None)


def test_links_of_a_directory(tmp_path):
    """What leads elsewhere is left out with a line, or refused where it is the tokenizer's or config.json."""
    source = tmp_path / "hf"
    hf_models.save(source)
    (source / "env.txt").symlink_to("/proc/self/environ")
    (source / "LICENSE").write_text("free")
    (source / "NOTICE").symlink_to("LICENSE")
    plan = from_hf.make_plan(source, None, [], None, None, "small")
    (note,) = [note for note in plan.notes if "env.txt" in note]
    assert note.startswith(f"left out: {source / 'env.txt'}: a link out of its directory, to /proc/")
    from_hf.convert(plan, tmp_path / "run", 1, lambda *_: None)
    (tmp_path / "run" / "hf" / "key").symlink_to("/proc/self/environ")  # a run that somebody else sent
    out = convert_out(tmp_path / "run", tmp_path / "out")
    assert {"NOTICE", "LICENSE"} < {file.name for file in out.iterdir()}
    assert not {"env.txt", "key"} & {file.name for file in [*out.iterdir(), *(tmp_path / "run").rglob("*.txt")]}
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes() if (source / name).exists() else b"{}")
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: a link out of its directory"):
            from_hf.make_plan(source, None, [], None, None, "small")
        (source / name).unlink()
        shutil.copy(tmp_path / name, source / name)
    assert origin.left_out(source) == [note]
