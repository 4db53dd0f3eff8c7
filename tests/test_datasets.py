"""Samples and micro-batches of small datasets whose every token is another number, so that each tells its place."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3_train.data import datasets, index
from dsv3_train.data.batches import KEYS, micro_batches, within
from dsv3_train.data.locate import outside
from dsv3_train.errors import UserError
from dsv3_train.runtime import distributed
from dsv3_train.runtime.launch import launch
from parity import tiny

S = 8  # sequence length
LENGTHS = np.random.RandomState(0).randint(1, 40, 60).astype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    if not torch.cuda.is_available():
        distributed.prepare_import("cpu")


def write(prefix: Path, lengths: np.ndarray = LENGTHS, first: int = 0) -> str:
    """A dataset of the tokens first, first + 1, ... in documents of `lengths`."""
    np.arange(first, first + lengths.sum(), dtype=np.uint16).tofile(f"{prefix}.bin")
    index.write(Path(f"{prefix}.idx"), np.dtype(np.uint16), lengths)
    return str(prefix)


def recipe(*prefixes: str, **data):
    return tiny(
        model={"vocab_size": 65536},
        training={"sequence_length": S},
        data={"train": [{"path": prefix} for prefix in prefixes], "valid_fraction": 0.0, **data},
    )


def samples(dataset) -> np.ndarray:
    """All of a dataset, [n, s + 1], having seen that each sample is well formed."""
    rows = []
    for i in range(len(dataset)):
        sample = dataset[i]
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert torch.equal(sample["loss_mask"], torch.ones(S))
        assert torch.equal(sample["position_ids"], torch.arange(S))
        rows.append([*sample["tokens"].tolist(), int(sample["labels"][-1])])
    return np.array(rows)


def test_packing_is_concatenation(tmp_path):
    train, valid = datasets.build(recipe(write(tmp_path / "a")), tmp_path / "cache", 10, 10)
    assert valid is None
    rows = samples(train)
    total = int(LENGTHS.sum())
    assert len(rows) == (total - 1) // S
    # One epoch holds each token once, but for the end that fills no sequence.
    counts = Counter(rows[:, :-1].ravel().tolist())
    assert set(counts.values()) == {1}
    assert total - len(counts) <= S
    # Within a sample a token is followed by the next of its document, or a document's last by another's first.
    ends = set((np.cumsum(LENGTHS) - 1).tolist())
    starts = {0, *(end + 1 for end in ends)}
    jumps = 0
    for row in rows:
        for one, other in itertools.pairwise(row.tolist()):
            assert other == one + 1 or (one in ends and other in starts)
            jumps += other != one + 1
    assert jumps > 20
    # A sample goes on where another one stops: its last label is the other's first token.
    assert set(rows[:, 0].tolist()) - set(rows[:, -1].tolist()) <= starts


def test_several_epochs(tmp_path):
    total = int(LENGTHS.sum())
    wanted = int(2.5 * total / S)
    train, _ = datasets.build(recipe(write(tmp_path / "a")), tmp_path / "cache", wanted, 0)
    assert len(train) >= wanted
    counts = Counter(samples(train)[:, :-1].ravel().tolist())
    assert len(counts) == total
    assert Counter(counts.values())[3] >= total - S
    assert set(counts.values()) <= {2, 3}


def test_more_samples_begin_with_the_same_ones(tmp_path):
    """Over epochs, to the sample; Megatron-core's own dataset shuffles over all of them together."""
    a = {"path": write(tmp_path / "a"), "weight": 1.0}
    b = {"path": write(tmp_path / "b", LENGTHS[:37], first=20_000), "weight": 2.5}
    epoch = (int(LENGTHS.sum()) - 1) // S
    for number, train in enumerate(([a], [a, b])):
        cache = tmp_path / f"cache{number}"
        wanted = (epoch - 3, epoch + 2, 2 * epoch, 5 * epoch)
        short, *longer = (samples(datasets.build(recipe(train=train), cache, count, 0)[0]) for count in wanted)
        assert all(len(rows) >= count for rows, count in zip((short, *longer), wanted, strict=True))
        for rows in longer:
            assert np.array_equal(rows[: len(short)], short)
            short = rows


def test_one_epoch_is_megatrons(tmp_path, monkeypatch):
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from dsv3_train.data import epochs  # not before the fixture above: it imports Megatron-core

    prefix, own = write(tmp_path / "a"), epochs.EpochDataset
    built = {}
    for kind in (own, GPTDataset):
        monkeypatch.setattr(epochs, "EpochDataset", kind)
        for count in (10, 3 * (int(LENGTHS.sum()) - 1) // S):
            built[kind, count > 10] = samples(datasets.build(recipe(prefix), tmp_path / kind.__name__, count, 0)[0])
    assert np.array_equal(built[own, False], built[GPTDataset, False])
    one = len(built[own, False])
    assert not np.array_equal(built[GPTDataset, True][:one], built[GPTDataset, False])  # what epochs.py is there for


def test_split_is_by_documents_and_disjoint(tmp_path):
    prefix = write(tmp_path / "a")
    boundary = int(LENGTHS[:48].sum())
    train, valid = datasets.build(recipe(prefix, valid_fraction=0.2), tmp_path / "cache", 10, 10)
    assert samples(train).max() < boundary <= samples(valid).min()
    # The training data does not depend on whether there is a validation.
    alone, none = datasets.build(recipe(prefix, valid_fraction=0.2), tmp_path / "cache", 10, 0)
    assert none is None
    assert np.array_equal(samples(train), samples(alone))


def test_separate_validation(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", first=20_000)
    train, valid = datasets.build(recipe(a, valid=[{"path": b}], valid_fraction=0.5), tmp_path / "cache", 10, 10)
    assert set(samples(train)[:, :-1].ravel()) <= set(range(int(LENGTHS.sum())))
    assert len(train) == (LENGTHS.sum() - 1) // S  # all of it
    assert samples(valid).min() >= 20_000


def test_blend_follows_the_weights(tmp_path):
    data = {
        "train": [
            {"path": write(tmp_path / "a"), "weight": 1.0},
            {"path": write(tmp_path / "b", first=20_000), "weight": 3.0},
        ],
        "valid_fraction": 0.3,
    }
    train, valid = datasets.build(recipe(**data), tmp_path / "cache", 400, 40)
    for built, count in ((train, 400), (valid, 40)):
        rows = samples(built)
        assert len(rows) >= count
        # Every beginning of the run sees the weights.
        for end in (count // 4, count // 2, count):
            assert abs((rows[:end, 0] >= 20_000).sum() - 0.75 * end) <= 1


def test_order_is_the_seeds(tmp_path):
    prefix = write(tmp_path / "a")
    orders = [
        samples(datasets.build(recipe(prefix, seed=seed), tmp_path / f"cache{i}", 10, 0)[0])
        for i, seed in enumerate((1, 1, 2))
    ]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_cache_is_not_trusted_when_torn_or_of_other_data(tmp_path):
    from dsv3_train.data import epochs

    prefix = write(tmp_path / "a")
    first = samples(datasets.build(recipe(prefix), tmp_path / "cache", 10, 0)[0])
    # A run that was killed while it wrote the cache.
    (torn,) = (tmp_path / "cache").glob("*/*shuffle_index.npy")
    torn.write_bytes(torn.read_bytes()[:100])
    (torn.parent / "complete").unlink()
    assert np.array_equal(first, samples(datasets.build(recipe(prefix), tmp_path / "cache", 10, 0)[0]))
    # A file of it that was changed, by a disk or by somebody: a pickle there would run what it says.
    for name in ("document", "sample", "shuffle"):
        (file,) = (tmp_path / "cache").glob(f"*/*{name}_index.npy")
        file.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
        assert np.array_equal(first, samples(datasets.build(recipe(prefix), tmp_path / "cache", 10, 0)[0]))
    epochs.seal(file.parent)
    file.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    epochs.seal(file.parent)  # also where whoever did so has sealed it
    with pytest.raises(UserError, match=r"shuffle_index\.npy: no array of numbers"):
        datasets.build(recipe(prefix), tmp_path / "cache", 10, 0)
    assert not (tmp_path / "ran").exists()
    # As many documents and tokens at the same place, but others.
    write(tmp_path / "a", LENGTHS[::-1].copy())
    again = samples(datasets.build(recipe(prefix), tmp_path / "cache", 10, 0)[0])
    assert not np.array_equal(first, again)
    assert not list(tmp_path.glob("a/**/*"))  # nothing beside the data


def test_every_rank_builds_the_same(tmp_path):
    prefix = write(tmp_path / "a")
    other = write(tmp_path / "b", first=20_000)

    def work():
        torch.distributed.init_process_group("gloo")
        train, valid = datasets.build(recipe(prefix, other, valid_fraction=0.3), tmp_path / "cache", 50, 10)
        rows = np.concatenate([samples(train), samples(valid)])
        np.save(tmp_path / f"{torch.distributed.get_rank()}.npy", rows)
        torch.distributed.destroy_process_group()

    launch(work, 2, "cpu")
    assert np.array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Numbers(torch.utils.data.Dataset):
    """Sample i is filled with i."""

    def __getitem__(self, i):
        x = torch.full((S,), i)
        return {"tokens": x, "labels": x, "position_ids": x, "loss_mask": x.float(), "dataset_id": 0}


PLAN = [(0, 8), (8, 8), (16, 16), (32, 24)]


def read(size, rank, ranks, **options) -> list[list[int]]:
    batches = list(micro_batches(Numbers(), iter(PLAN), size, rank, ranks, **options))
    assert all(set(batch) == {"tokens", "labels", "position_ids", "loss_mask"} for batch in batches)
    assert all(batch["tokens"].shape == (size, S) and batch["loss_mask"].dtype == torch.float32 for batch in batches)
    return [batch["tokens"][:, 0].tolist() for batch in batches]


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (1, 4), (2, 2), (2, 4), (8, 1)])
def test_ranks_together_read_the_global_batch_in_order(size, ranks):
    each = [read(size, rank, ranks) for rank in range(ranks)]
    # Micro-batch by micro-batch, rank by rank: the samples in order, whatever the layout.
    assert [i for batches in zip(*each, strict=True) for batch in batches for i in batch] == list(range(56))


def test_reading_ahead_changes_neither_order_nor_random_numbers():
    torch.manual_seed(5)
    expected = (read(2, 1, 2), torch.rand(1))
    torch.manual_seed(5)
    assert (read(2, 1, 2, workers=2), torch.rand(1)) == expected


@pytest.mark.parametrize("token", [100, -1])
@pytest.mark.parametrize("name", ["tokens", "labels"])
def test_a_token_that_the_model_has_not(token, name):
    batch = {name: torch.arange(6).view(2, 3) for name in KEYS}
    wrong = {**batch, name: torch.tensor([[0, 1, 2], [3, token, 5]])}
    samples: list[int] = []
    first, second = within(100, iter([dict(batch), wrong]), samples.append)
    assert all(torch.equal(first[one], batch[one]) for one in KEYS)
    assert samples == [1]
    assert second[name].tolist() == [[0, 1, 2], [3, 0, 5]]


def test_a_token_is_told_with_its_document(tmp_path):
    """Wherever it is in its sample, in one dataset and in a blend."""
    total = int(LENGTHS.sum())
    a, b = write(tmp_path / "a"), write(tmp_path / "b", first=20_000)
    ends = np.cumsum(LENGTHS)
    for token in (0, 7, total // 2, total - 9):
        tokens = np.arange(total, dtype=np.uint16)
        tokens[token] = 65_000
        tokens.tofile(f"{a}.bin")
        for prefixes in ((a,), (b, a)):
            train, _ = datasets.build(recipe(*prefixes), tmp_path / "cache" / f"{len(prefixes)}", 60, 0)
            rows = samples(train)
            for number in np.flatnonzero((rows == 65_000).any(axis=1)).tolist():
                document = int(np.searchsorted(ends, token, side="right"))
                assert outside(train, number, 65_000) == (
                    f"sample {number} holds token 65000, of document {document} of {a}, but model.vocab_size is 65000"
                )


@pytest.mark.parametrize("workers", [0, 1])
def test_plan_may_be_endless(workers):
    plan = ((4 * step, 4) for step in itertools.count())
    batches = micro_batches(Numbers(), plan, 2, 0, 1, workers=workers)
    assert [int(next(batches)["tokens"][0, 0]) for _ in range(6)] == [0, 2, 4, 6, 8, 10]
    batches.close()


def test_a_global_batch_has_to_divide():
    with pytest.raises(ValueError, match="no multiple of 6"):
        list(micro_batches(Numbers(), [(0, 8)], 2, 0, 3))
