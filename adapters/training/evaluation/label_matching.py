"""Matching of a stored version's outputs to the classes of a training, by label."""

# N rows · O out_features · C classes of the training · L labels of the version · E of these that the training lacks
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from adapters.training.gradient.losses import row_losses
from adapters.training.settings import Loss, TrainingSpec

Labels: TypeAlias = Sequence[str | int]
_CLASS_LOSSES = (Loss.CROSS_ENTROPY, Loss.BINARY_CROSS_ENTROPY)
# Probability of a class that the version lacks. With 0, its loss would be infinite; `log_loss` clips here too.
_MIN_PROBABILITY = torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True, eq=False)
class LabelMatching:
    """Matching of a training's classes to the outputs of a version with other labels."""

    labels: int
    """L: the outputs of the version that have a label, the first ones."""
    places_C: Tensor
    """(C,) int64: the output of the version for each class; -1 if the version has no such label."""
    others_E: Tensor
    """(E,) int64: outputs of the version whose labels the training lacks."""

    def logits(self, loss: Loss, y_NO: Tensor) -> Tensor:
        """Return the version's outputs in the order of the classes: (N, O) float64 -> (N, C), or (N, C + E).

        With `cross_entropy`, the labels that only the version has follow: it can answer with them, and then it is
        wrong. A class that the version lacks has the least probability, so it is never the answer.
        """
        x_NL, places_C = y_NO[:, : self.labels], self.places_C.to(y_NO.device)
        if loss is Loss.BINARY_CROSS_ENTROPY:
            least = math.log(_MIN_PROBABILITY) - math.log1p(-_MIN_PROBABILITY)
            return torch.where(places_C >= 0, x_NL[:, places_C.clamp_min(0)], least)
        least_N1 = x_NL.logsumexp(dim=1, keepdim=True) + math.log(_MIN_PROBABILITY)
        known_NC = torch.where(places_C >= 0, x_NL[:, places_C.clamp_min(0)], least_N1)
        return torch.cat([known_NC, x_NL[:, self.others_E.to(y_NO.device)]], dim=1)

    def losses(self, spec: TrainingSpec, y_NO: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row, (N,): of outputs (N, O) float64 against classes (N,), or shares (N, C).

        With `cross_entropy`, the probabilities (and the label smoothing) are over the version's own labels, and a row
        of a class that it lacks has the loss of the least probability.
        """
        if spec.loss is Loss.BINARY_CROSS_ENTROPY:
            logits_NC = self.logits(spec.loss, y_NO)
            return row_losses(replace(spec, classes=None), logits_NC.T.unsqueeze(0), targets.to(y_NO).T.unsqueeze(0))[0]
        own_N = self.places_C.to(targets.device)[targets]
        own_spec = replace(spec, classes=self.labels)
        losses_N = row_losses(own_spec, y_NO.T.unsqueeze(0), own_N.clamp_min(0).unsqueeze(0))[0]
        return torch.where(own_N >= 0, losses_N, -math.log(_MIN_PROBABILITY))


def match_labels(
    version: Labels | None, training: Labels | None, spec: TrainingSpec, *, outputs: int
) -> LabelMatching | None:
    """Return how to match a version's outputs, or None if they are in the order of the training's classes already.

    Outputs that are numbers to hit have no labels, and stay in their order.
    """
    if spec.loss not in _CLASS_LOSSES or version == training:
        return None
    theirs = range(outputs) if version is None else version
    ours = range(spec.classes or outputs) if training is None else training
    if list(theirs) == list(ours):
        return None
    place = {label: number for number, label in enumerate(theirs)}
    known = set(ours)
    others = [number for number, label in enumerate(theirs) if label not in known]
    return LabelMatching(
        labels=len(theirs),
        places_C=torch.tensor([place.get(label, -1) for label in ours]),
        others_E=torch.tensor(others, dtype=torch.int64),
    )


def why_unmatched(version: Labels | None, version_loss: object, training: Labels | None, loss: Loss) -> str | None:
    """Say why a version's outputs cannot be matched to the classes of a training; None if they can.

    version_loss: what the version was trained with, None if that is not known.
    """
    if loss not in _CLASS_LOSSES:
        return None
    if version_loss in _CLASS_LOSSES and version_loss != loss:
        return f"it was trained with {version_loss}, and this training is one with {loss}"
    if version is not None and training is not None:
        return None if set(version) & set(training) else "it has none of the labels of this training"
    if version is None and not _are_positions(training):
        return "it has no labels, and this training has"
    if training is None and not _are_positions(version):
        return "it has labels, and this training has none"
    return None


def _are_positions(labels: Labels | None) -> bool:
    """Return whether each label is the number of its output, which is the name of an output without a label."""
    return labels is None or list(labels) == list(range(len(labels)))
