"""The defaults of a training are one declaration: API, client, command line and page have the same ones."""

from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from loraplex import Client
from loraplex.cli.root import cli
from loraplex.defaults import DEFAULTS
from typer.main import get_command

from adapters.training.settings import AUTO, SETTINGS, Method, field_of
from tests.conftest import Serve
from tests.integration.cli.conftest import DIGITS, invoke
from tests.integration.client.test_retries import JOB
from tests.integration.openapi.document_schemas import DOCUMENT

_SCHEMAS = DOCUMENT["components"]["schemas"]
_BODIES = {"": "TrainRequest", "training.": "TrainingBody", "split.": "SplitBody", "publish.": "GateBody"}
_ROOT: Any = get_command(cli)
_OPTIONS = {option.name: option for option in _ROOT.commands["train"].params}
_OPTION_NAMES = {"split.fraction": "held_out", "publish.metric": "metric", "publish.margin": "margin"}


def _of_the_api() -> dict[str, Any]:
    """Path of each field → its default."""
    return {
        within + name: schema["default"]
        for within, body in _BODIES.items()
        for name, schema in _SCHEMAS[body]["properties"].items()
        if not isinstance(schema.get("default", {}), dict)
    }


class _Form(HTMLParser):
    """Path of each field of the form → what it says if it is left as it is."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.said: dict[str, str] = {}
        self._field = ""
        self._is_first = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("data-field"):
            self._field = str(given["data-field"])
            if given.get("placeholder"):
                self.said[self._field] = str(given["placeholder"])
        self._is_first = tag == "option" and given.get("value") == ""

    def handle_data(self, data: str) -> None:
        if self._is_first:
            self.said.setdefault(self._field, data)
            self._is_first = False


def _text(path: str, default: Any) -> str:
    """A default as people read it."""
    setting = SETTINGS.get(path.removeprefix("training."))
    if setting is not None and setting.takes_auto and setting.methods != tuple(Method):
        return f"{AUTO}; {default} with "
    return f"{default:g}" if isinstance(default, float) else str(default)


def test_the_api_has_the_defaults_of_the_table_of_settings() -> None:
    of_the_api = _of_the_api()
    declared = {field_of(name): setting.default for name, setting in SETTINGS.items()}
    for path, default in declared.items():
        assert of_the_api.get(path) == default, path
    auto = ("rank", "split", "training.method", "training.loss", "training.bias")
    assert {path: of_the_api[path] for path in auto} == dict.fromkeys(auto, AUTO)
    assert of_the_api["publish"] == "if_not_worse"


def test_the_help_of_the_command_line_has_the_defaults_of_the_api() -> None:
    of_the_api = _of_the_api()
    assert {path.removeprefix("training."): value for path, value in of_the_api.items()} == DEFAULTS
    shown = 0
    for path, default in of_the_api.items():
        option = _OPTIONS.get(_OPTION_NAMES.get(path, path.rpartition(".")[2]))
        if option is not None and not (path == "publish.metric" and "." not in path):
            expected = _text(path, default).replace("_", "-" if path == "publish" else "_")
            assert str(option.show_default).startswith(expected), path
            assert option.default is None, path
            shown += 1
    assert shown >= 14


def test_the_form_of_the_page_has_the_defaults_of_the_api(serve: Serve) -> None:
    client, _ = serve(base="digits")
    client.put("/datasets/t", content=DIGITS.read_bytes(), headers={"Content-Type": "text/csv"}).raise_for_status()
    said = _Form(client.get("/ui/datasets/t").text).said
    of_the_api = _of_the_api()
    paths = said.keys() & of_the_api.keys()
    assert len(paths) >= 12
    for path in paths:
        assert said[path].startswith(_text(path, of_the_api[path]).replace("_", " ")), path


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of each training that the command line requests; nothing is trained."""
    made: list[dict[str, Any]] = []

    def train(_client: Client, **arguments: Any) -> Any:
        # Not a part of the body.
        assert arguments.pop("idempotency_key") is None
        made.append(arguments)
        raise httpx.HTTPError("not sent")

    monkeypatch.setattr(Client, "train", train)
    return made


def test_the_client_sends_only_what_it_is_given() -> None:
    sent: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.content)
        return httpx.Response(202, json=JOB)

    with Client("http://127.0.0.1:1", transport=httpx.MockTransport(answer)) as client:
        client.train("acme", inputs=[[1.0]], targets=[[2.0]])
        client.train("acme", inputs=[[1.0]], targets=[[2.0]], split=None)
    plain = b'{"name":"acme","data":{"inputs":[[1.0]],"targets":[[2.0]]}}'
    assert sent == [plain, plain.replace(b'"data"', b'"split":null,"data"')]


def test_the_command_line_sends_only_what_it_is_given(serve: Serve, requests: list[dict[str, Any]]) -> None:
    http, _ = serve(base="digits")
    url = str(http.base_url)
    for options in ((), ("--split", "none", "--publish", "if-better", "--no-bias", "--rank", 3)):
        with pytest.raises(httpx.HTTPError):
            invoke("train", DIGITS, "--name", "acme", "--target", "digit", *options, url=url)
    plain, more = requests
    assert plain.keys() == {"name", "data"}
    assert more.keys() == {"name", "data", "split", "publish", "training", "rank"}
    assert (more["split"], more["publish"], more["training"]) == (None, {"when": "if_better"}, {"bias": False})
