"""The client's tree of errors is the service's."""

import pytest
from loraplex import errors
from loraplex.decode import Answer, error_of

from adapters import errors as domain
from app.http import errors as web
from app.http import host_policy

MODULES = (domain, web, host_policy)
OWN = {"Unreachable", "TimedOut", "BadAnswer", "JobFailed", "JobCancelled"}


def tree_of(root: type[Exception], *modules: str) -> dict[str, tuple[str, str]]:
    """Name → (code, parent's name) of everything below `root` that these modules define."""
    found: dict[str, tuple[str, str]] = {}
    for kind in root.__subclasses__():
        if kind.__module__ in modules and not kind.__name__.startswith("_"):
            found[kind.__name__] = (kind.code, root.__name__)  # type: ignore[attr-defined]
        found |= tree_of(kind, *modules)
    return found


def test_every_error_of_the_service_has_its_class_here_with_the_same_code_and_parent() -> None:
    services = tree_of(domain.LoraplexError, *(module.__name__ for module in MODULES))
    clients = tree_of(errors.LoraplexError, errors.__name__)
    assert len(services) > 50
    assert {name: of for name, of in clients.items() if name not in OWN} == services


def test_every_error_has_the_title_that_the_service_gives_it() -> None:
    for module in MODULES:
        for name in tree_of(domain.LoraplexError, module.__name__):
            title = str(getattr(module, name).__doc__).partition("\n")[0].rstrip(".")
            assert str(getattr(errors, name).__doc__).partition("\n")[0].rstrip(".") == title


def test_every_code_that_an_answer_can_have_comes_back_as_its_class() -> None:
    for code, status in web.STATUS.items():
        error = error_of(answered(status, code))
        assert (error.code, error.status) == (code, status)
        assert type(error).code == code


@pytest.mark.parametrize(
    ("status", "general"),
    [
        (400, errors.InvalidInput),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (418, errors.LoraplexError),
        (422, errors.InvalidInput),
        (429, errors.QueueFull),
        (500, errors.InternalError),
        (502, errors.InternalError),
        (503, errors.NotReady),
    ],
)
def test_a_code_that_is_not_known_here_is_the_general_error_of_its_status(
    status: int, general: type[errors.LoraplexError]
) -> None:
    error = error_of(answered(status, "made_up_later"))
    assert type(error) is general
    assert error.code == "made_up_later"


def answered(status: int, code: str) -> Answer:
    content = f'{{"code": "{code}", "detail": "so it was", "title": "t"}}'.encode()
    headers = {"content-type": "application/problem+json"}
    return Answer(url="http://x/y", status=status, headers=headers, content=content)
