"""Real tables that ship with scikit-learn, split once into rows to train on and rows that no training ever sees."""

# N rows · I in_features · O out_features
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_linnerud, load_wine
from sklearn.model_selection import train_test_split

from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData
from tests.support.dense_oracle import answer

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Inputs (N, I) float32 and targets, (N,) int64 or (N, O) float32."""

    inputs: Array
    targets: Array
    test_inputs: Array
    test_targets: Array

    @property
    def data(self) -> TrainingData:
        """The rows to train on."""
        return TrainingData(torch.from_numpy(self.inputs), torch.from_numpy(self.targets))

    def accuracy(self, base: BaseLayer, adapter: Adapter) -> float:
        """On the rows that were not trained on."""
        answers_NO = answer(base, torch.from_numpy(self.test_inputs), adapter)
        return float((answers_NO.argmax(axis=1) == self.test_targets).mean())


def classes(name: str, seed: int, *, test: float = 0.25) -> Split:
    """Standardised by the training rows and split class by class; `digits` as a scanner sees them that turns and
    inverts, 0 to 16 as they are."""
    inputs_NI, classes_N = {"digits": load_digits, "wine": load_wine, "cancer": load_breast_cancer}[name](
        return_X_y=True
    )
    if name == "digits":
        inputs_NI = turned_and_inverted(inputs_NI)
    return _split(inputs_NI, classes_N, seed, test=test, scaled=name != "digits", by_class=True)


def numbers(name: str, seed: int, *, test: float = 0.25) -> Split:
    """Inputs standardised by the training rows; targets in their own unit less their mean, over their spread."""
    inputs_NI, targets_NO = {"diabetes": load_diabetes, "linnerud": load_linnerud}[name](return_X_y=True)
    targets_NO = targets_NO.reshape(len(inputs_NI), -1)
    targets_NO = (targets_NO - targets_NO.mean(axis=0)) / targets_NO.std(axis=0)
    return _split(inputs_NI, targets_NO.astype(np.float32), seed, test=test, scaled=True, by_class=False)


def turned_and_inverted(images_NI: Array) -> Array:
    """(N, 64): a quarter anticlockwise, black for white."""
    turned: Array = 16 - np.rot90(images_NI.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    return turned


def _split(inputs_NI: Array, targets: Array, seed: int, *, test: float, scaled: bool, by_class: bool) -> Split:
    train_N, test_N = train_test_split(
        np.arange(len(inputs_NI)), test_size=test, random_state=seed, stratify=targets if by_class else None
    )
    if scaled:
        inputs_NI = (inputs_NI - inputs_NI[train_N].mean(axis=0)) / inputs_NI[train_N].std(axis=0)
    inputs_NI = np.ascontiguousarray(inputs_NI, np.float32)
    return Split(inputs_NI[train_N], targets[train_N], inputs_NI[test_N], targets[test_N])
