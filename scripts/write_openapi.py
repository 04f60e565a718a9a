"""Write docs/openapi.json, which a test holds against the code: what clients rely on changes on purpose alone."""

from pathlib import Path

from app.http.application import build_routes
from app.openapi.document import document, to_text

FILE = Path(__file__).parents[1] / "docs" / "openapi.json"


def main() -> None:
    """Write the document of the code as it is."""
    FILE.write_text(to_text(document(build_routes())), "utf-8")


if __name__ == "__main__":
    main()
