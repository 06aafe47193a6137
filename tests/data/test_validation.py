"""A validation partition of one's own."""

from __future__ import annotations

import gin
import numpy as np
import pytest

from fedexp.data import FederatedDataset, FederatedSplits, split_validation
from fedexp.errors import UserError


def _splits(sizes: tuple[int, ...] = (10, 1, 2, 40)) -> FederatedSplits:
    offsets = np.cumsum([0, *sizes])
    ids = np.array([f"c{i}" for i in range(len(sizes))])
    train = FederatedDataset({"x": np.arange(offsets[-1])}, offsets, ids)
    test = FederatedDataset({"x": np.arange(3)}, [0, 3], np.array(["other"]))
    return FederatedSplits(train, test)


def test_takes_a_part_of_every_client_that_can_spare_it():
    before = _splits()
    after = split_validation(before, fraction=0.2)
    assert after.test is before.test
    assert after.train.client_ids.tolist() == ["c0", "c1", "c2", "c3"]
    assert after.train.client_sizes.tolist() == [8, 1, 1, 32]
    assert after.validation.client_ids.tolist() == ["c0", "c2", "c3"]
    assert after.validation.client_sizes.tolist() == [2, 1, 8]
    for client_id, examples in before.train.clients():
        parts = [
            part.slice(start, start + size)["x"]
            for part in (after.train, after.validation)
            for start, size in zip(*part.rows_of([client_id]), strict=True)
        ]
        assert sorted(np.concatenate(parts)) == examples["x"].tolist()


def test_the_seed_says_which():
    def chosen(seed: int) -> list[int]:
        return split_validation(_splits(), seed=seed).validation.features["x"].tolist()

    assert chosen(1) == chosen(1) != chosen(2)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5])
def test_a_fraction_out_of_range(fraction):
    with pytest.raises(UserError, match=rf"fraction must be between 0 and 1, got {fraction}"):
        split_validation(_splits(), fraction)


def test_what_cannot_be_split():
    with pytest.raises(UserError, match="has a validation partition"):
        split_validation(split_validation(_splits()))
    with pytest.raises(UserError, match="all have one"):
        split_validation(_splits((1, 1)))


def test_in_a_gin_file(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(40))
    with gin.unlock_config():
        gin.parse_config(
            f"""
            split_validation.splits = @arrays()
            split_validation.fraction = 0.5
            arrays.path = {str(tmp_path / "a.npz")!r}
            arrays.partition = @iid()
            arrays.test_fraction = 0.2
            iid.num_clients = 4
            """
        )
    splits = gin.get_configurable("split_validation")()
    assert [part.client_sizes.tolist() for part in splits] == [[4] * 4, [2] * 4, [4] * 4]
