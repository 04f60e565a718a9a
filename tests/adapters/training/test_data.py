"""Training data: it survives its file, and a split takes each row once."""

import pytest
import torch

from adapters.training.data import TrainingData

INPUTS = torch.arange(60, dtype=torch.float32).reshape(20, 3)
DATA = TrainingData(INPUTS, INPUTS[:, :1] * 10, torch.ones(1, 2), torch.ones(2, 3))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("data", [DATA, TrainingData(INPUTS, torch.arange(20))], ids=["numbers", "classes"])
def test_what_is_stored_is_read_back(data: TrainingData) -> None:
    again = TrainingData.from_bytes(data.to_bytes())
    for name in ("inputs_NI", "targets", "start_OR", "start_RI"):
        before, after = getattr(data, name), getattr(again, name)
        assert (before is None and after is None) or (before.equal(after) and before.dtype == after.dtype)


def test_the_digest_is_over_the_rows_and_not_over_where_training_starts() -> None:
    same = TrainingData(INPUTS.clone(), INPUTS[:, :1] * 10)
    assert same.digest() == DATA.digest()
    others = [
        TrainingData(INPUTS + 1, DATA.targets),
        TrainingData(INPUTS, DATA.targets + 1),
        TrainingData(INPUTS, DATA.targets.long()[:, 0]),
        TrainingData(INPUTS.reshape(10, 6), DATA.targets),
    ]
    assert len({data.digest() for data in [DATA, *others]}) == 5


@pytest.mark.parametrize("held_out", [1, 6, 19])
def test_a_split_takes_each_row_once_with_its_own_target(held_out: int) -> None:
    training, validation = DATA.split(held_out, _generator())
    assert validation is not None
    assert (training.rows, validation.rows) == (20 - held_out, held_out)
    rows = torch.cat([training.inputs_NI, validation.inputs_NI])
    assert rows[rows[:, 0].argsort()].equal(INPUTS)
    for part in (training, validation):
        assert part.targets.equal(part.inputs_NI[:, :1] * 10)


def test_a_split_is_drawn_at_random_from_the_seed() -> None:
    splits = {tuple(DATA.split(5, _generator(seed))[0].inputs_NI[:, 0].tolist()) for seed in range(8)}
    assert len(splits) > 4
    assert DATA.split(5, _generator(3))[0].inputs_NI.equal(DATA.split(5, _generator(3))[0].inputs_NI)


def test_without_a_split_all_rows_are_trained_on_and_nothing_is_drawn() -> None:
    generator = _generator()
    training, validation = DATA.split(0, generator)
    assert training.inputs_NI.equal(INPUTS)
    assert validation is None
    assert torch.rand(3, generator=generator).equal(torch.rand(3, generator=_generator()))
