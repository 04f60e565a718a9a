"""Checkpoints on disk: whole or not at all, one file a claim, handed on from claim to claim."""

from pathlib import Path

import pytest
import torch

from adapters.training.gradient.checkpoint import CheckpointFolder, load_checkpoint, save_checkpoint


def _save(path: Path, number: float) -> None:
    save_checkpoint(path, {"factors": torch.full((2, 3), number)}, {"step": number}, of="this training")


def _read(path: Path) -> float | None:
    found = load_checkpoint(path, of="this training")
    if found is None:
        return None
    tensors, about = found
    assert torch.equal(tensors["factors"], torch.full((2, 3), float(about["step"])))
    return float(about["step"])


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "job.1.safetensors"
    assert _read(path) is None
    for number in (1, 2):
        _save(path, number)
        assert _read(path) == number
        assert _names(path.parent) == [path.name]


def test_a_checkpoint_of_another_training_is_none(tmp_path: Path) -> None:
    path = tmp_path / "job.1.safetensors"
    _save(path, 1)
    assert load_checkpoint(path, of="another training") is None


@pytest.mark.parametrize("content", [b"", b"torn", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 64])
def test_what_cannot_be_read_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "job.1.safetensors"
    path.write_bytes(content)
    assert _read(path) is None


def test_a_checkpoint_that_was_cut_off_is_none(tmp_path: Path) -> None:
    path = tmp_path / "job.1.safetensors"
    _save(path, 1)
    path.write_bytes(path.read_bytes()[:-1])
    assert _read(path) is None


def test_what_cannot_be_written_leaves_the_last_one_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "job.1.safetensors"
    _save(path, 1)
    # A folder in the temporary file's place: opening it fails as a full disk does, with an OSError.
    (tmp_path / "job.1.tmp").mkdir()
    _save(path, 2)
    assert "no checkpoint is written" in caplog.text
    assert _read(path) == 1


def test_the_next_claim_goes_on_from_the_last_one_s_and_shares_no_file_with_it(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    first = checkpoints.take_over("job", 1)
    assert _read(first) is None
    _save(first, 1)
    second = checkpoints.take_over("job", 2)
    assert _read(second) == 1
    assert not first.exists()
    # A fit of the first claim that goes on writes its own, and the second's is not touched.
    _save(first, 5)
    assert _read(second) == 1
    _save(second, 3)
    assert _read(first) == 5
    assert _read(checkpoints.take_over("job", 3)) == 3


def test_claims_that_wrote_none_are_passed_over(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    _save(checkpoints.take_over("job", 2), 2)
    # As numbers and not as text: 10 comes after 9.
    assert _read(checkpoints.take_over("job", 9)) == 2
    assert _read(checkpoints.take_over("job", 10)) == 2
    assert _names(tmp_path) == ["job.10.safetensors"]


def test_a_later_claim_s_is_not_taken_by_an_earlier_one(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    _save(checkpoints.take_over("job", 3), 3)
    assert _read(checkpoints.take_over("job", 2)) is None
    assert _names(tmp_path) == ["job.3.safetensors"]


def test_one_that_is_half_written_is_not_handed_on(tmp_path: Path) -> None:
    (tmp_path / "job.1.tmp").write_bytes(b"half")
    checkpoints = CheckpointFolder(tmp_path)
    assert not checkpoints.take_over("job", 2).exists()


def test_a_job_that_has_ended_loses_all_of_its_files_and_no_other_does(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    assert checkpoints.jobs() == set()
    for job_id in ("job", "another"):
        _save(checkpoints.take_over(job_id, 1), 1)
        _save(tmp_path / f"{job_id}.2.safetensors", 2)
        (tmp_path / f"{job_id}.2.tmp").write_bytes(b"half")
    assert checkpoints.jobs() == {"job", "another"}
    checkpoints.drop("job")
    assert _names(tmp_path) == ["another.1.safetensors", "another.2.safetensors", "another.2.tmp"]
    checkpoints.drop("job")
    assert checkpoints.jobs() == {"another"}


def test_a_folder_that_is_not_there_has_no_checkpoints(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path / "none")
    assert checkpoints.jobs() == set()
    checkpoints.drop("job")
    assert not (tmp_path / "none").exists()
