"""Text as it may reach a terminal: what others chose (names, labels, messages) can neither steer nor reorder it."""

_JOINERS = "\u200c\u200d"
"""Scripts and emoji are written with them."""


def visible(text: str) -> str:
    """One line, with control characters, line ends, changes of direction and lone surrogates as escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in _JOINERS else _escape(each) for each in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
