"""What ends the demo early."""


class DemoFailed(Exception):
    """Something did not go as the story says; the message says what."""


def check(holds: bool, claim: str) -> None:
    """Raise `DemoFailed` where a claim of the story does not hold."""
    if not holds:
        raise DemoFailed(f"The demo claims that {claim}, and here it is not so.")
