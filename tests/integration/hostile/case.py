"""A bad request, what it must be answered with, and how that is checked."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx

from adapters.errors import MAX_BAD_ROWS
from app.service import Service
from tests.support.catalog_factories import stored_bytes, stored_files

_PAGE = (Path(__file__).parents[3] / "docs" / "errors.md").read_text()
DOCUMENTED = {
    code: (int(status), title) for code, status, title in re.findall(r"\| `(\w+)` \| (\d+) \| (.+) \|", _PAGE)
}
_NEEDED = {"type", "title", "status", "detail", "code"}
_OPTIONAL = {"field", "row", "given", "expected"}
_LONGEST_PROBLEM = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One bad request. `name` finishes the sentence "it is refused to …"; the rest is what the answer must say."""

    name: str
    method: str
    path: str
    """As it is sent, percent signs and dots included."""
    code: str
    says: tuple[str, ...] = ()
    """Words that name the culprit: each stands in the detail, the field or what was given."""
    field: str | None = None
    row: int | None = None
    body: bytes | Callable[[], bytes] = b""
    """The bytes, or what makes them when the case is sent: a large body must not be made for tests that do not run."""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chunked: bool = False
    """Whether the body is sent without saying how long it is."""

    def __post_init__(self) -> None:
        assert self.says or self.field, f"{self.name}: a case must know its culprit"


class Target:
    """A service with something stored, and how it stood before anybody tried anything."""

    def __init__(self, client: httpx.Client, service: Service, names: Iterable[str]) -> None:
        self.client = client
        self.service = service
        self._names = tuple(names)
        self._before = self.state()
        self._listed = self.lists()

    def send(self, case: Case) -> httpx.Response:
        """The answer to a case."""
        body = case.body() if callable(case.body) else case.body
        content = _pieces(body) if case.chunked else body
        # As the target: httpx would tidy a path up.
        target = {"target": case.path.encode()}
        headers = {name.encode(): value.encode("latin-1") for name, value in case.headers.items()}
        return self.client.request(case.method, "/", content=content, headers=headers, extensions=target)

    def state(self) -> Mapping[str, Any]:
        """What is stored, and the answer to a good request."""
        good = {"adapters": ["acme", "acme@1", None], "inputs": [[1.0] * 10, [-2.0] * 10, [0.5] * 10]}
        answer = self.client.post("/predict", json=good).raise_for_status().content
        folder = self.service.settings.data_dir
        return {
            "answer": answer,
            "revision": self.service.catalog.revision(),  # every publish, delete and roll back raises it
            "jobs": [(job.id, job.status) for job in self.service.queue.list(tenant="default")],
            "blobs": sorted((name, len(stored_bytes(folder, name))) for name in stored_files(folder)),
            "folder": sorted(path.name for path in folder.iterdir()),
        }

    def lists(self) -> Mapping[str, Any]:
        """Everything that a client can list."""
        paths = ["/adapters", "/jobs", *(f"/adapters/{name}/versions" for name in self._names)]
        return {path: self.client.get(path).raise_for_status().json()["data"] for path in paths}

    def refuses(self, case: Case) -> None:
        """Fails unless the case is answered as it says and nothing has changed."""
        answer = self.send(case)
        members = problem_of(answer)
        assert members["code"] == case.code, members
        if case.field is not None:
            assert members.get("field") == case.field, members
        assert members.get("row") == case.row, members
        told = " ".join(str(members.get(name, "")) for name in ("detail", "field", "given"))
        assert [words for words in case.says if words not in told] == [], members
        assert self.state() == self._before

    def refuses_in_protocol(self, case: Case) -> None:
        """As `refuses`, for the paths under `/v2`, where an error is one text."""
        answer = self.send(case)
        text = protocol_error_of(answer)
        assert answer.status_code == DOCUMENTED[case.code][0], answer.text
        assert [words for words in case.says if words not in text] == [], text
        assert self.state() == self._before

    def is_untouched(self) -> None:
        """Fails if anything that a client can list is not as it was."""
        assert self.lists() == self._listed


def problem_of(answer: httpx.Response) -> dict[str, Any]:
    """The members of a problem, after checking that it is one, and one that the docs have."""
    assert answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    members: dict[str, Any] = answer.json()
    assert members.keys() >= _NEEDED, members
    rows = members.pop("rows", [])
    assert (members["code"] == "bad_rows") == (0 < len(rows) <= MAX_BAD_ROWS), rows
    assert all(row.keys() == {"row", "column", "reason"} and len(row["reason"]) <= 200 for row in rows), rows
    assert members.keys() <= _NEEDED | _OPTIONAL, members
    assert (members["status"], members["title"]) == DOCUMENTED[members["code"]], members
    assert members["status"] == answer.status_code
    assert members["type"] == f"urn:loraplex:{members['code']}"
    texts = [members[name] for name in members if name not in ("status", "row")]
    assert all(isinstance(text, str) for text in texts), members
    assert members["detail"]
    assert len(members.get("given", "")) <= 100
    assert type(members.get("row", 0)) is int
    assert len(answer.content) <= _LONGEST_PROBLEM + 400 * len(rows), members
    return members


def protocol_error_of(answer: httpx.Response) -> str:
    """The text of an error of the Open Inference Protocol, after checking that it is one."""
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/json", answer.text
    members: dict[str, Any] = answer.json()
    assert members.keys() == {"error"}, members
    text: str = members["error"]
    assert isinstance(text, str), members
    assert text
    assert len(answer.content) <= _LONGEST_PROBLEM, members
    return text


def _pieces(body: bytes) -> Iterable[bytes]:
    for begin in range(0, len(body), 65536):
        yield body[begin : begin + 65536]
