"""How large a window is."""

from typing import Literal, NamedTuple


class View(NamedTuple):
    """A window's size in CSS pixels."""

    width: int
    height: int


DESKTOP = View(1280, 800)
PHONE = View(390, 844)
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
