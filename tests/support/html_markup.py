"""What a page asks a browser to run and to load."""

from html.parser import HTMLParser


class Markup(HTMLParser):
    """The parts of a page that a strict policy has a say in, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            assert not data.strip(), f"written into the page: {data[:80]}"
        self.text += data

    def addresses(self) -> list[str]:
        """Everything that is loaded or can be followed."""
        named = ("src", "href", "action", "hx-get", "data-url")
        return [value for _, given in self.elements for name in named if (value := given.get(name))]
