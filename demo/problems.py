"""What ends the demo early."""


class DemoFailed(Exception):
    """A step of the demo had another result than expected; the message says which."""


def check(holds: bool, claim: str) -> None:
    """Raise `DemoFailed` if a claim of the demo does not hold."""
    if not holds:
        raise DemoFailed(f"The demo claims that {claim}, and here it is not so.")
