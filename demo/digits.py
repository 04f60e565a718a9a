"""The data: handwritten digits, and what two tenants' scanners make of them.

1,797 images of 8×8 pixels, 0 (blank) to 16 (ink), as scikit-learn's `load_digits()` has them. Source:
"Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
CC BY 4.0.
`scripts/train_digits_base.py` wrote the file.
"""

# N rows · I in_features, 64 pixels
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SOURCE = "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI, CC BY 4.0"
DATA_FILE = Path(__file__).resolve().parent / "digits.npz"
INK = 16
TRAINING_ROWS = 900
"""The base layer was trained on the rows before this one; all accuracies are on the rest."""

Array = NDArray[Any]
Scanner = Callable[[Array], Array]


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Images (N, 64) with their classes (N)."""

    images: Array
    labels: Array

    def seen_by(self, scanner: Scanner) -> "Digits":
        """Return the same digits as the new scanner delivers them."""
        return Digits(scanner(self.images), self.labels)

    def share_right(self, answers_N: Array) -> float:
        """Which part of these answers is right, 0 to 1."""
        return float(np.mean(answers_N == self.labels))


def load_digits() -> tuple[Digits, Digits]:
    """Return the rows for training, and the held-out rows."""
    with np.load(DATA_FILE, allow_pickle=False) as file:
        # Signed: 16 - x on bytes would be right for these images only.
        images_NI, labels_N = file["images"].astype(np.int16), file["labels"].astype(np.int64)
    split = TRAINING_ROWS
    return Digits(images_NI[:split], labels_N[:split]), Digits(images_NI[split:], labels_N[split:])


def rotate_and_invert(images_NI: Array) -> Array:
    """Return the images turned by 90° anticlockwise, with black and white exchanged."""
    return (INK - np.rot90(images_NI.reshape(-1, 8, 8), axes=(1, 2))).reshape(-1, 64)


def fade(images_NI: Array) -> Array:
    """Half the contrast, on a grey page: 0 … 16 becomes 8 … 16."""
    return images_NI / 2 + INK / 2


def draw(image_I: Array) -> str:
    """One image as eight lines of text, darker where there is more ink."""
    shades = " ░▒▓█"
    levels = np.rint(image_I.reshape(8, 8) / INK * (len(shades) - 1)).astype(int)
    return "\n".join("".join(shades[level] * 2 for level in line) for line in levels)
