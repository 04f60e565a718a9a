"""Failures of the system that are answered as errors of the service, not as defects."""

import errno

import pytest

from adapters.errors import LoraplexError, StorageFailed, StorageFull, TooManyOpenFiles
from app.http.errors import known_failure


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EIO, StorageFailed),
        (errno.EROFS, StorageFailed),
        (errno.EINTR, StorageFailed),
        (errno.EMFILE, TooManyOpenFiles),
    ],
)
def test_a_failure_of_the_system_is_known(number: int, expected: type[LoraplexError]) -> None:
    assert type(known_failure(OSError(number, "it failed"))) is expected


def test_another_failure_is_a_defect() -> None:
    assert known_failure(OSError(errno.ENOENT, "no such file")) is None
