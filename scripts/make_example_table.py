"""Write examples/turned-digits.csv: what a tenant has whose scanner turns pages by 90° and prints white on black.

A row an image: `pixel_0` … `pixel_63`, 0 (blank) to 16 (ink), and the `digit` on it. The bundled base layer was trained
on the same images as they were; about a tenth of its answers to these are right.
"""

import csv
from pathlib import Path

from demo.digits import load_digits, rotate_and_invert

ROWS = 500
TABLE = Path(__file__).parents[1] / "examples" / "turned-digits.csv"


def main() -> None:
    """Write the table from the rows that may be trained on."""
    digits = load_digits()[0].seen_by(rotate_and_invert)
    with TABLE.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*(f"pixel_{n}" for n in range(64)), "digit"])
        for image, label in zip(digits.images[:ROWS].tolist(), digits.labels[:ROWS].tolist(), strict=True):
            table.writerow([*image, label])


if __name__ == "__main__":
    main()
