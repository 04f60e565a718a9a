"""The command line. Nothing slow is imported before a command needs it."""


def main() -> None:
    """The console script."""
    from loraplex.cli.root import run

    run()
