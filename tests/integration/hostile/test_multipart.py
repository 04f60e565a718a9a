"""`PUT /adapters/{name}` in parts: bodies that are no two files."""

import pytest

from tests.integration.hostile.bodies import (
    CONFIG_FILE,
    GOOD_FILES,
    MULTIPART,
    TENSOR_FILE,
    config,
    multipart,
    multipart_of,
    part,
)
from tests.integration.hostile.case import Case, Target

# The web framework leaves the temporary file of a part that never ends to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning"
)
CONFIG = part(GOOD_FILES[CONFIG_FILE], filename=CONFIG_FILE)
TENSORS = part(GOOD_FILES[TENSOR_FILE], filename=TENSOR_FILE)
GOOD = multipart(CONFIG, TENSORS)


def _case(title: str, body: bytes, *says: str, field: str | None = None, kind: str = MULTIPART) -> Case:
    return Case(
        name=title,
        method="PUT",
        path="/adapters/fresh",
        code="invalid_upload",
        says=says,
        field=field,
        body=body,
        headers={"Content-Type": kind},
    )


FILES = [
    _case("no config", multipart(TENSORS), field=CONFIG_FILE),
    _case("no tensors", multipart(CONFIG), field=TENSOR_FILE),
    _case("no parts", multipart(), "missing"),
    _case("two configs", multipart(CONFIG, TENSORS, CONFIG), CONFIG_FILE, "twice"),
    _case("two files of tensors", multipart(TENSORS, TENSORS, CONFIG), TENSOR_FILE, "twice"),
    _case("a pickle", multipart(CONFIG, part(b"x", filename="adapter_model.bin")), "adapter_model.bin"),
    _case(
        "a pickle as well", multipart(CONFIG, TENSORS, part(b"x", filename="adapter_model.bin")), "adapter_model.bin"
    ),
    _case("another file", multipart(CONFIG, TENSORS, part(b"{}", filename="tokenizer.json")), "tokenizer.json"),
    _case("a file without a name", multipart(CONFIG, TENSORS, part(b"", filename="")), "file"),
    _case("a path upwards", multipart(CONFIG, part(b"x", filename=f"../{TENSOR_FILE}")), f"../{TENSOR_FILE}"),
    _case("an absolute path", multipart(part(b"x", filename=f"/{CONFIG_FILE}"), TENSORS), f"/{CONFIG_FILE}"),
    _case("a folder", multipart(CONFIG, part(b"x", filename=f"a/{TENSOR_FILE}")), f"a/{TENSOR_FILE}"),
    _case("a look-alike name", multipart(CONFIG, part(b"x", filename="аdapter_model.safetensors")), "dapter_model"),
    _case("a name with a space at its end", multipart(CONFIG, part(b"x", filename=f"{TENSOR_FILE} ")), TENSOR_FILE),
    _case("a name in capitals", multipart(CONFIG, part(b"x", filename=TENSOR_FILE.upper())), TENSOR_FILE.upper()),
    _case("a name of 100,000 characters", multipart(CONFIG, part(b"x", filename="n" * 100_000)), "cannot be read"),
    _case("a name of 1,000 characters", multipart(CONFIG, part(b"x", filename="n" * 1000)), "nnnn"),
    _case(
        "a plain field", multipart(CONFIG, TENSORS, part(b"2", filename=None, field="alpha")), "alpha", field="alpha"
    ),
    _case("plain fields only", multipart(part(config(), filename=None, field=CONFIG_FILE)), field=CONFIG_FILE),
    _case("a plain field of a megabyte", multipart(part(b"2" * 1_100_000, filename=None)), "body"),
    _case("a hundred files", multipart(*[part(b"", filename="README.md")] * 100), "many files"),
    _case("a hundred fields", multipart(*[part(b"", filename=None)] * 100), "field"),
    _case("a zip of the files", multipart(part(b"PK", filename="adapter.zip")), "adapter.zip"),
]

FRAMES = [
    _case("no boundary", GOOD, "boundary", kind="multipart/form-data"),
    _case("an empty boundary", GOOD, "body", kind="multipart/form-data; boundary="),
    _case("another boundary", GOOD, "body", kind="multipart/form-data; boundary=elsewhere"),
    _case("a boundary of 1,000 characters", GOOD, "body", kind=f"multipart/form-data; boundary={'b' * 1000}"),
    _case("a boundary that is not ASCII", GOOD, "body", kind="multipart/form-data; boundary=\xff"),
    _case("no bytes", b"", "missing"),
    _case("no parts at all", b"garbage", "body"),
    _case("JSON", b'{"A": [[1], [1]], "B": [[1]]}', "body"),
    _case("a part without headers", b"--frontier\r\n\r\nx\r\n--frontier--\r\n", "Content-Disposition"),
    _case("a part without a name", multipart(CONFIG).replace(b'name="file"; ', b""), "name"),
    _case("a header that never ends", b"--frontier\r\nContent-Disposition" + b"x" * 100_000, "body"),
    _case("a header of invalid bytes", b"--frontier\r\nContent\xff-Disposition: form-data\r\n\r\n", "body"),
    _case("an end before the files", b"--frontier--\r\n" + GOOD, "missing"),
    _case("a body cut in its last file", GOOD[:-60], "missing"),
    _case("a body cut in its first header", GOOD[:30], "missing"),
    _case(
        "a charset that decodes nothing",
        multipart(part(b"", filename=None)),
        "body",
        kind=f"{MULTIPART}; charset=undefined",
    ),
    *(
        _case(
            f"the charset {charset}",
            multipart(part(b"\xff", filename=None, field="alpha")),
            "is not a file",
            kind=f"{MULTIPART}; charset={charset}",
        )
        for charset in ("latin-1", "utf-16", "punycode", "idna", "zlib", "no-such", "rot13")
    ),
]


@pytest.mark.parametrize("case", FILES + FRAMES, ids=lambda case: case.name)
def test_an_upload_is_refused_for(target: Target, case: Case) -> None:
    target.refuses(case)


def test_a_readme_is_ignored_and_nothing_else_is(target: Target) -> None:
    files = dict(GOOD_FILES) | {"README.md": b"# x", "LICENSE": b"x"}
    target.refuses(_case("a licence", multipart_of(files), "LICENSE"))
