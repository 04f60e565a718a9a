"""Escapes for text of others (names, labels, messages) before it is printed to a terminal."""

# Scripts and emoji need them.
_JOINERS = "\u200c\u200d"


def escape(text: str) -> str:
    """Return one line with control characters, line ends, changes of direction and lone surrogates as escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in _JOINERS else _escape(each) for each in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
