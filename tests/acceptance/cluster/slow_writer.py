"""A process that writes a blob, and publishes an adapter in it when a line arrives on its standard input.

`python -m tests.acceptance.cluster.slow_writer FOLDER DATABASE_URL BLOB_URL` prints the name of the blob before that,
and then the number of the version, or the name of the error's class.
"""

import sys
import time
from pathlib import Path

from adapters.catalog.catalog import Catalog
from adapters.errors import LoraplexError
from adapters.storage.blob_location import BlobLocation
from adapters.storage.postgres_database import PostgresDatabase
from tests.support.catalog_factories import publication


def main() -> None:
    """Publish, with a pause between the blob and its transaction's end."""
    folder, database_url, blob_url = sys.argv[1:]
    location = BlobLocation(folder=Path(folder), url=blob_url)
    catalog = Catalog(Path(folder), now=time.time, blobs=location, database=PostgresDatabase(database_url))

    write = catalog.blobs.write

    def write_and_wait(name: str, content: bytes) -> None:
        write(name, content)
        print(name, flush=True)
        sys.stdin.readline()

    catalog.blobs.write = write_and_wait  # type: ignore[method-assign,assignment]

    try:
        (published,) = catalog.publish([publication("slow", 1)], tenant="default")
        print(published.version.version, flush=True)
    except LoraplexError as error:
        print(type(error).__name__, flush=True)


if __name__ == "__main__":
    main()
