"""PEFT files of an adapter: read from a model, a folder or a zip archive, and written to a folder."""

import io
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loraplex.errors import BadAnswer, InvalidInput, InvalidUpload, WrongType

CONFIG, TENSORS = FILES = ("adapter_config.json", "adapter_model.safetensors")
_BOTH = " and ".join(FILES)
_MAX_CONFIG_BYTES = 2**20
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_SIGNATURE = b"PK\x03\x04"


def read_source(source: Any) -> bytes:
    """Return a zip archive of the two PEFT files of a model (which is saved first), of a folder, or of an archive."""
    if hasattr(source, "save_pretrained"):
        with TemporaryDirectory(prefix="loraplex-") as folder:
            source.save_pretrained(folder)
            return pack(Path(folder))
    try:
        path = Path(source)
    except TypeError:
        kind, expected = type(source).__name__, "a PEFT model, a folder, a zip file, or the factors A and B"
        detail = f"an adapter cannot be read from a {kind}"
        raise WrongType(detail, field="source", given=kind, expected=expected) from None
    if path.is_dir():
        return pack(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror}", "a folder or a zip file") from None
    if not content.startswith(_SIGNATURE):
        raise _refusal(path, "is no zip file", f"a zip, or the folder, of {_BOTH}")
    return content


def pack(folder: Path) -> bytes:
    """Return a zip archive of the PEFT files of a folder, or of its only subfolder that has them.

    PEFT saves a named adapter in a subfolder.
    """
    adapters = [folder] if _has_adapter(folder) else sorted(filter(_has_adapter, folder.iterdir()))
    if len(adapters) != 1:
        names = ", ".join(adapter.name for adapter in adapters) or "nothing of the kind"
        one = "PEFT writes one with save_pretrained(folder, selected_adapters=[name])"
        raise _refusal(folder, f"does not hold one adapter: in it is {names}", f"a folder with {_BOTH}; {one}")
    buffer = io.BytesIO()
    # Not strict: reproducible builds set the file time 0, and a zip archive cannot represent times before 1980.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        for name in FILES:
            archive.write(adapters[0] / name, name)
    return buffer.getvalue()


def unpack(content: bytes, folder: Path) -> Path:
    """Write the two PEFT files of an archive to a folder, and nothing else; create the folder if needed."""
    max_bytes = {CONFIG: _MAX_CONFIG_BYTES, TENSORS: len(content)}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            names = sorted(member.filename for member in members)
            # Member names are compared and never used as paths. What is written is no larger than what was received.
            if names != sorted(FILES):
                raise BadAnswer(f"the download holds {names}", expected=_BOTH)
            for member in members:
                if member.compress_type not in _COMPRESSIONS or member.file_size > max_bytes[member.filename]:
                    raise BadAnswer("the download has an unknown form", expected=_BOTH)
            files = {name: archive.read(name) for name in FILES}
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, zlib.error) as error:
        raise BadAnswer(f"the download is no zip that can be read: {error}", expected=_BOTH) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, file_content in files.items():
            (folder / name).write_bytes(file_content)
    except OSError as error:
        detail, expected = f"{folder} cannot be written: {error.strerror}", "a folder that can be written, or made"
        raise InvalidInput(detail, field="folder", given=str(folder), expected=expected) from None
    return folder


def _has_adapter(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _refusal(path: Path, detail: str, expected: str) -> InvalidUpload:
    return InvalidUpload(f"{path} {detail}", field="source", given=str(path), expected=expected)
