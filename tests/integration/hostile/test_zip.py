"""`PUT /adapters/{name}` as a zip: bombs, paths, links, and what is no zip at all."""

import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO

import pytest

from tests.integration.hostile.bodies import (
    CONFIG_FILE,
    GOOD_FILES,
    JSON,
    MULTIPART,
    TENSOR_FILE,
    ZIP,
    config,
    multipart_of,
    zip_of,
)
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.conftest import MAX_BODY_BYTES

GOOD = zip_of(GOOD_FILES)
PAIRS = list(GOOD_FILES.items())
CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"


def _zip(title: str, body: bytes, *says: str) -> Case:
    return Case(
        name=title,
        method="PUT",
        path="/adapters/fresh",
        code="invalid_archive",
        says=says or ("zip",),
        body=body,
        headers={"Content-Type": ZIP},
    )


def _with(name: str, content: bytes = b"x") -> bytes:
    """A good zip with one more entry."""
    return zip_of([*PAIRS, (name, content)])


def _patched(*changes: tuple[bytes, int, str, int], body: bytes = GOOD) -> bytes:
    """A zip with a field (by its record's signature, offset and struct format) of the first such record changed."""
    patched = bytearray(body)
    for signature, offset, kind, value in changes:
        struct.pack_into(kind, patched, patched.index(signature) + offset, value)
    return bytes(patched)


def _marked(name: str, mark: Callable[[zipfile.ZipInfo], None]) -> bytes:
    """A good zip with one entry marked as something else."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file, content in PAIRS:
            entry = zipfile.ZipInfo(file)
            if file == name:
                mark(entry)
            archive.writestr(entry, content)
    return buffer.getvalue()


def _as_link(entry: zipfile.ZipInfo) -> None:
    entry.create_system, entry.external_attr = 3, 0o120777 << 16


def _in_folders(folders: Mapping[str, str] | Sequence[str]) -> bytes:
    """Each of the two files in its folder."""
    return zip_of([(f"{folder}{name}", content) for folder, (name, content) in zip(folders, PAIRS, strict=True)])


def _zip64(offset: int, size: int) -> bytes:
    """A good zip whose first entry says in its zip64 extra field where it lies and how long it is."""
    extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
    start = GOOD.index(CENTRAL)
    end = start + 46 + len(CONFIG_FILE)
    head = bytearray(GOOD[start:end])
    struct.pack_into("<IIH", head, 20, 0xFFFFFFFF, 0xFFFFFFFF, len(CONFIG_FILE))
    struct.pack_into("<H", head, 30, len(extra))
    struct.pack_into("<I", head, 42, 0xFFFFFFFF)
    body = GOOD[:start] + bytes(head) + extra + GOOD[end:]
    added = len(extra)
    size_of_directory = struct.unpack_from("<I", GOOD, GOOD.index(END) + 12)[0]
    return _patched((END, 12, "<I", size_of_directory + added), body=body)


PATHS = [
    _zip("a path upwards", _in_folders(["../", "../"]), "../"),
    _zip("a path upwards within", _in_folders(["a/../", "a/../"]), "a/../"),
    _zip("an absolute path", _in_folders(["/etc/", "/etc/"]), "/etc/"),
    _zip("a backslash", _in_folders(["a\\", "a\\"]), "a\\"),
    _zip("a drive", _in_folders(["C:", "C:"]), "C:"),
    _zip("a path upwards that is ignored otherwise", _with("../README.md"), "../README.md"),
    _zip("an absolute path that is ignored otherwise", _with("/README.md"), "/README.md"),
    _zip("a folder upwards", _with("../", b""), "../"),
    _zip("a nested folder", _in_folders(["a/b/", "a/b/"]), "a/b/"),
    _zip("two folders", _in_folders(["a/", "b/"]), "folder"),
    _zip("one file in a folder", _in_folders(["", "a/"]), "folder"),
    _zip("a NUL in a name", _with("README.md").replace(b"README.md", b"READ\0E.md"), "READ"),
    _zip("a look-alike name", zip_of([("аdapter_config.json", config()), PAIRS[1]]), "dapter_config"),
    _zip("a name in capitals", zip_of([("Adapter_Config.json", config()), PAIRS[1]]), "Adapter_Config.json"),
    _zip("an empty name", _with(""), "zip entry"),
]

FILES = [
    _zip("a pickle", _with("adapter_model.bin"), "adapter_model.bin"),
    _zip("a pickle instead", zip_of([PAIRS[0], ("adapter_model.bin", b"x")]), "adapter_model.bin"),
    _zip("another file", _with("tokenizer.json"), "tokenizer.json"),
    _zip("a hidden file", _with(".DS_Store"), ".DS_Store"),
    _zip("a program", _with("run.py"), "run.py"),
    _zip("a zip in a zip", _with("adapter.zip", GOOD), "adapter.zip"),
    _zip("no config", zip_of(PAIRS[1:]), CONFIG_FILE),
    _zip("no tensors", zip_of(PAIRS[:1]), TENSOR_FILE),
    _zip("nothing", zip_of([]), "zip"),
    _zip("two configs", zip_of([*PAIRS, PAIRS[0]]), CONFIG_FILE, "twice"),
    _zip("two files of tensors", zip_of([PAIRS[1], *PAIRS]), TENSOR_FILE, "twice"),
    _zip("a hundred entries", zip_of([*PAIRS, *((f"{n}/README.md", b"") for n in range(98))]), "100 entries"),
    _zip("a link", _marked(CONFIG_FILE, _as_link), CONFIG_FILE, "link"),
    _zip("a link to elsewhere", _marked(TENSOR_FILE, _as_link), TENSOR_FILE, "link"),
    _zip("encryption", _patched((CENTRAL, 8, "<H", 1), (LOCAL, 6, "<H", 1)), CONFIG_FILE, "encrypted"),
    _zip("strong encryption", _patched((CENTRAL, 8, "<H", 64), (LOCAL, 6, "<H", 64))),
    _zip("bzip2", zip_of(GOOD_FILES, method=zipfile.ZIP_BZIP2), CONFIG_FILE, "deflate"),
    _zip("LZMA", zip_of(GOOD_FILES, method=zipfile.ZIP_LZMA), CONFIG_FILE, "deflate"),
    _zip("an unknown method", _patched((CENTRAL, 10, "<H", 99), (LOCAL, 8, "<H", 99)), CONFIG_FILE, "deflate"),
]

SIZES = [
    _zip("a bomb", zip_of(GOOD_FILES | {TENSOR_FILE: b"\0" * (MAX_BODY_BYTES + 1)}), TENSOR_FILE, str(MAX_BODY_BYTES)),
    _zip("a bomb of a gigabyte", _patched((CENTRAL, 24, "<I", 1 << 30)), CONFIG_FILE, str(1 << 30)),
    _zip("a size of 2^32 - 2", _patched((CENTRAL, 24, "<I", 2**32 - 2)), CONFIG_FILE),
    _zip("a size of 2^63", _zip64(0, 2**63), CONFIG_FILE),
    _zip("a size that is too small", _patched((CENTRAL, 24, "<I", 3)), "zip"),
    _zip("an offset of 2^63", _zip64(2**63, len(config()))),
    _zip("an offset of 2^64 - 1", _zip64(2**64 - 1, len(config()))),
    _zip("an offset past the end", _patched((CENTRAL, 42, "<I", 2**31))),
    _zip("a checksum that is wrong", _patched((CENTRAL, 16, "<I", 7)), "zip"),
    _zip("a directory past its end", _patched((END, 12, "<I", 2**31))),
    _zip("a directory that begins elsewhere", _patched((END, 16, "<I", 2**31))),
    _zip("a name that is longer than the file", _patched((CENTRAL, 28, "<H", 60_000))),
    _zip("another disk", _patched((CENTRAL, 34, "<H", 9), (LOCAL, 26, "<H", 9))),
]

NO_ZIPS = [
    _zip("no bytes", b""),
    _zip("no zip", b"PK" * 100),
    _zip("zeros", b"\0" * 1000),
    _zip("JSON", b'{"A": [[1], [1]], "B": [[1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]}'),
    _zip("a multipart body", multipart_of(GOOD_FILES)),
    _zip("a safetensors file", GOOD_FILES[TENSOR_FILE]),
    _zip("half a zip", GOOD[: len(GOOD) // 2]),
    _zip("a zip without its beginning", GOOD[40:]),
    _zip("a zip without its last byte", GOOD[:-1]),
    _zip("a zip with a broken stream", GOOD.replace(GOOD[60:80], b"\xff" * 20)),
    Case(
        name="a zip sent as JSON",
        method="PUT",
        path="/adapters/fresh",
        code="not_json",
        says=("the body",),
        body=GOOD,
        headers={"Content-Type": JSON},
    ),
    Case(
        name="a zip sent in parts",
        method="PUT",
        path="/adapters/fresh",
        code="invalid_upload",
        field="body",
        body=GOOD,
        headers={"Content-Type": MULTIPART},
    ),
]


@pytest.mark.parametrize("case", PATHS + FILES + SIZES + NO_ZIPS, ids=lambda case: case.name)
def test_an_upload_is_refused_for(target: Target, case: Case) -> None:
    target.refuses(case)


@pytest.mark.parametrize("name", ["foreign", "elsewhere"])
def test_a_download_made_for_another_service_is_refused(target: Target, name: str) -> None:
    archive = target.client.get(f"/adapters/{name}/download").raise_for_status().content
    code = {"foreign": "base_mismatch", "elsewhere": "feature_space_mismatch"}[name]
    target.refuses(
        Case(
            name=name,
            method="PUT",
            path="/adapters/fresh",
            code=code,
            field=TENSOR_FILE,
            body=archive,
            headers={"Content-Type": ZIP},
        )
    )
