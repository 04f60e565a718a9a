"""Train the bundled base layer: a 64 → 10 classifier of handwritten digits.

Run from anywhere, with the development lock installed (scikit-learn is in no other):

    .venv/bin/python scripts/train_digits_base.py

It writes `adapters/bundled/digits.safetensors`, the layer, and `demo/digits.npz`, the data set for the demo.
Running it again writes the same bytes.

The data is scikit-learn's `load_digits()`, 1,797 images of 8×8 pixels from 0 to 16: the test part of "Optical
Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, CC BY 4.0. The rows stay in their order, trained on 0 to 899 and
held out from 900; shuffled before the split, the same training is right on two points more.
"""

# N rows · I in_features, 64 pixels · O out_features, 10 classes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

PROJECT = Path(__file__).resolve().parent.parent
LAYER_FILE = PROJECT / "adapters" / "bundled" / "digits.safetensors"
DATA_FILE = PROJECT / "demo" / "digits.npz"

TRAINING_ROWS = 900
WHITE = 16

Array = NDArray[Any]


def main() -> None:
    """Train, write both files, say how good the layer is on the rows that it has not seen."""
    images_NI, labels_N = load_digits(return_X_y=True)
    weight_OI, bias_O = train(images_NI[:TRAINING_ROWS], labels_N[:TRAINING_ROWS])
    save_layer(weight_OI, bias_O)
    save_data(images_NI, labels_N)

    held_out_NI, truth_N = images_NI[TRAINING_ROWS:], labels_N[TRAINING_ROWS:]
    for what, seen_NI in (("upright", held_out_NI), ("rotated and inverted", rotate_and_invert(held_out_NI))):
        right = np.mean((seen_NI @ weight_OI.T + bias_O).argmax(axis=1) == truth_N)
        print(f"{right:6.1%} right on {len(truth_N)} held-out digits, {what}")
    for path in (LAYER_FILE, DATA_FILE):
        print(f"{path.relative_to(PROJECT)}: {path.stat().st_size:,} bytes")


def train(images_NI: Array, labels_N: Array) -> tuple[Array, Array]:
    """Multinomial logistic regression on scaled pixels; the scaling is folded into the W and b returned."""
    mean_I = images_NI.mean(axis=0)
    # One grey level more than the deviation: a pixel that is nearly always blank must not count for much.
    scale_I = images_NI.std(axis=0) + 1
    # Newton's method runs to the one minimum, so that nothing depends on where an iteration stopped...
    model = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-10, max_iter=200)
    model.fit((images_NI - mean_I) / scale_I, labels_N)
    weight_OI = model.coef_ / scale_I
    bias_O = model.intercept_ - weight_OI @ mean_I
    # ... and the order in which a BLAS sums is far below these decimals. The + 0.0 turns -0 into 0.
    return weight_OI.round(6).astype(np.float32) + 0.0, bias_O.round(6).astype(np.float32) + 0.0


def rotate_and_invert(images_NI: Array) -> Array:
    """Every image turned by 90° anticlockwise, black for white: the scanner of the demo's first tenant."""
    return (WHITE - np.rot90(images_NI.reshape(-1, 8, 8), axes=(1, 2))).reshape(-1, 64)


def save_layer(weight_OI: Array, bias_O: Array) -> None:
    """`weight` (10, 64) and `bias` (10), float32."""
    LAYER_FILE.parent.mkdir(exist_ok=True)
    layer = {"weight": torch.from_numpy(weight_OI).contiguous(), "bias": torch.from_numpy(bias_O)}
    # Not save_file, which leaves a file that only its owner may read: the image runs as another user.
    LAYER_FILE.write_bytes(save(layer))


def save_data(images_NI: Array, labels_N: Array) -> None:
    """`images` (1797, 64) and `labels` (1797), bytes. NumPy dates what it zips 1980: no clock gets in."""
    DATA_FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(DATA_FILE, images=images_NI.astype(np.uint8), labels=labels_N.astype(np.uint8))


if __name__ == "__main__":
    main()
