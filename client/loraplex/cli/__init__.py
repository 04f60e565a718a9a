"""The command line. Nothing slow is imported before a command needs it."""

from loraplex.cli.exit_codes import INTERRUPTED


def main() -> None:
    """The console script."""
    from loraplex.cli.stdio import prepare

    prepare()
    try:
        from loraplex.cli.root import run

        run()
    except KeyboardInterrupt:  # before there is a command to be interrupted
        raise SystemExit(INTERRUPTED) from None
