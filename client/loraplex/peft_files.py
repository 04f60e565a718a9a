"""PEFT files of an adapter: read from a model, a folder or a zip archive, and written to a folder."""

import io
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loraplex.errors import BadAnswer, InvalidInput, InvalidUpload, WrongType

CONFIG, TENSORS = FILES = ("adapter_config.json", "adapter_model.safetensors")
_MOST_CONFIG_BYTES = 2**20
_KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
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
        raise WrongType(
            f"an adapter cannot be read from a {type(source).__name__}",
            field="source",
            given=type(source).__name__,
            expected="a PEFT model, a folder, a zip file, or the factors A and B",
        ) from None
    if path.is_dir():
        return pack(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidUpload(
            f"{path} cannot be read: {error.strerror}",
            field="source",
            given=str(path),
            expected="a folder or a zip file",
        ) from None
    if not content.startswith(_SIGNATURE):
        raise InvalidUpload(
            f"{path} is no zip file", field="source", given=str(path), expected=f"a zip, or the folder, of {_both()}"
        )
    return content


def pack(folder: Path) -> bytes:
    """Return a zip archive of the PEFT files of a folder, or of its only subfolder that has them.

    PEFT saves a named adapter in a subfolder.
    """
    places = [folder] if _holds(folder) else sorted(below for below in folder.iterdir() if _holds(below))
    if len(places) != 1:
        found = ", ".join(place.name for place in places) or "nothing of the kind"
        raise InvalidUpload(
            f"{folder} does not hold one adapter: in it is {found}",
            field="source",
            given=str(folder),
            expected=f"a folder with {_both()}; PEFT writes one with save_pretrained(folder, selected_adapters=[name])",
        )
    buffer = io.BytesIO()
    # Not strict: reproducible builds set the file time 0, and a zip archive cannot represent times before 1980.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        for name in FILES:
            archive.write(places[0] / name, name)
    return buffer.getvalue()


def unpack(content: bytes, folder: Path) -> Path:
    """Write the two PEFT files of an archive to a folder, and nothing else; create the folder if needed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            # Member names are compared and never used as paths. What is written is no larger than what was received.
            if sorted(infos) != sorted(FILES) or len(archive.infolist()) != len(FILES):
                raise BadAnswer(f"the download holds {sorted(infos)}", expected=_both())
            if any(info.compress_type not in _KINDS for info in infos.values()):
                raise BadAnswer("the download is packed in a way that is not read here", expected=_both())
            most = {CONFIG: _MOST_CONFIG_BYTES, TENSORS: len(content)}
            if any(infos[name].file_size > most[name] for name in FILES):
                raise BadAnswer("the download is packed more tightly than an adapter can be", expected=_both())
            files = {name: archive.read(name) for name in FILES}
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, zlib.error) as error:
        raise BadAnswer(f"the download is no zip that can be read: {error}", expected=_both()) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, held in files.items():
            (folder / name).write_bytes(held)
    except OSError as error:
        raise InvalidInput(
            f"{folder} cannot be written: {error.strerror}",
            field="folder",
            given=str(folder),
            expected="a folder that can be written, or made",
        ) from None
    return folder


def _holds(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _both() -> str:
    return " and ".join(FILES)
