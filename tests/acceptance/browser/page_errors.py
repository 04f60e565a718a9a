"""What goes wrong on a page while nobody looks."""

import re

from playwright.sync_api import BrowserContext, ConsoleMessage, Request, WebError

_WORTH_TELLING = ("error", "warning")


class Troubles:
    """Errors in a browser's console, uncaught ones, what a content security policy refused, requests to other origins.

    Chromium tells what a policy refused, and answers of 400 and above, in its console.
    """

    def __init__(self) -> None:
        self._seen: list[str] = []
        self._allowed: list[str] = []

    def watch(self, context: BrowserContext, origin: str) -> None:
        """Write down what happens on the pages of `context`, which belong to `origin`."""

        def console(message: ConsoleMessage) -> None:
            if message.type in _WORTH_TELLING:
                self._seen.append(f"console {message.type}: {message.text} ({message.location['url']})")

        def uncaught(error: WebError) -> None:
            self._seen.append(f"uncaught: {error.error}")

        def request(request: Request) -> None:
            if not request.url.startswith((f"{origin}/", f"blob:{origin}/", "data:")):
                self._seen.append(f"request elsewhere: {request.url}")

        context.on("console", console)
        context.on("weberror", uncaught)
        context.on("request", request)

    def allow(self, pattern: str) -> None:
        """Expect what matches `pattern` (a regular expression), such as `status of 422`: at least once in the test."""
        self._allowed.append(pattern)

    def check(self) -> None:
        """Fails where something happened that was not allowed, and where something allowed did not happen."""
        other = [one for one in self._seen if not any(re.search(pattern, one) for pattern in self._allowed)]
        assert not other, "the page had trouble:\n" + "\n".join(other)
        absent = [pattern for pattern in self._allowed if not any(re.search(pattern, one) for one in self._seen)]
        assert not absent, f"allowed, and it did not happen: {absent}"
