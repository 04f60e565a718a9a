"""What the processes print."""

import logging


def configure() -> None:
    """Lines on standard error, from INFO on; of Alembic, which talks at every start, only what is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
