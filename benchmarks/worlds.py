"""Tenants with few rows beside one base layer: six kinds of tenants (worlds), on texts and on digits.

In every world the base layer is a logistic head, trained on rows of its own. The kinds differ in what the tenants'
labels have to do with those of the base layer.
"""

# N rows · K rows of one tenant · T test rows of one tenant · I in_features · C classes
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from benchmarks.texts import encoded_texts

Inputs = NDArray[np.float32]
Classes = NDArray[np.int64]

TENANTS, NEWCOMERS = 60, 10
FEWEST_ROWS, MOST_ROWS = 10, 50
NEWCOMER_ROWS = 30
_MOST_TEST_ROWS = 800
# The logit of a class that the base layer never saw.
_UNSEEN = -10.0
_INDUSTRIES = 5


class Kind(StrEnum):
    """What the tenants' labels have to do with those of the base layer."""

    INDUSTRIES = "A"
    """The tenants of each of five industries rename some classes alike, and each tenant renames a few more."""
    SHARED = "B"
    """All tenants rename some classes alike, and each tenant renames a few more."""
    UNRELATED_REMAPS = "C"
    """Each tenant renames classes of its own."""
    NO_CHANGE = "D"
    """The labels are those of the base layer."""
    UNSEEN = "E"
    """Each tenant has some of the classes that the base layer never saw."""
    UNRELATED_LABELS = "F"
    """Each tenant has a few classes of its own, on outputs that mean something else in the base layer."""


@dataclass(frozen=True, slots=True)
class Source:
    """Data set, and how many of its classes are renamed; `few` classes are all that a tenant of E or F has."""

    load: Callable[[], tuple[Inputs, Classes]]
    base_rows: int
    test_rows: int
    industry: int
    shared: int
    unrelated: int
    own: int
    few: int
    has_rows_for_all: bool
    """Whether no two tenants have a row in common."""


def _digits() -> tuple[Inputs, Classes]:
    inputs_NI, classes_N = load_digits(return_X_y=True)
    return (inputs_NI / 16).astype(np.float32), classes_N.astype(np.int64)


SOURCES = {
    "texts": Source(
        encoded_texts, 5_000, 3_200, industry=10, shared=11, unrelated=11, own=3, few=5, has_rows_for_all=True
    ),
    "digits": Source(_digits, 500, 800, industry=5, shared=6, unrelated=6, own=2, few=3, has_rows_for_all=False),
}


@dataclass(frozen=True, slots=True, eq=False)
class Tenant:
    """Few labelled rows of one tenant, and rows to judge its adapter on."""

    inputs_KI: Inputs
    classes_K: Classes
    test_inputs_TI: Inputs
    test_classes_T: Classes
    ceiling: float
    """Test accuracy of a logistic head that was trained on all rows that tenants may have, under this one's labels."""


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """Base layer with its labels, tenants, and newcomers, which are tenants that nothing was learned from."""

    weight_CI: Inputs
    bias_C: Inputs
    labels: tuple[str, ...]
    tenants: tuple[Tenant, ...]
    newcomers: tuple[Tenant, ...]


@cache
def rows_of(data: str) -> tuple[Inputs, Classes]:
    """Return all rows of a data set: inputs (N, I) and classes (N,)."""
    return SOURCES[data].load()


def logistic_head(inputs_NI: Inputs, classes_N: Classes, *, classes: int) -> tuple[Inputs, Inputs]:
    """Return W (C, I) and b (C,) of a logistic regression; a class without rows has W = 0 and a low b."""
    head = LogisticRegression(C=10, max_iter=1_000).fit(inputs_NI, classes_N)
    weight_CI = np.zeros((classes, inputs_NI.shape[1]), np.float32)
    bias_C = np.full(classes, _UNSEEN, np.float32)
    weight_CI[head.classes_], bias_C[head.classes_] = head.coef_, head.intercept_
    return weight_CI, bias_C


def labels_of(classes: int) -> tuple[str, ...]:
    """Return the labels of the classes, in an order that sorting keeps."""
    return tuple(f"class-{number:02d}" for number in range(classes))


def world(kind: str, data: str, seed: int, *, tenants: int = TENANTS) -> World:
    """Return the world of this kind on a data set; a seed splits the rows alike in all kinds."""
    source, (inputs_NI, classes_N) = SOURCES[data], rows_of(data)
    C = int(classes_N.max()) + 1
    order_N = np.random.default_rng(seed).permutation(len(classes_N))
    base_N, test_N, pool_N = np.split(order_N, [source.base_rows, source.base_rows + source.test_rows])
    if kind == Kind.UNSEEN:
        base_N = base_N[classes_N[base_N] < C // 2]
    weight_CI, bias_C = logistic_head(inputs_NI[base_N], classes_N[base_N], classes=C)
    head = logistic_head(inputs_NI[pool_N], classes_N[pool_N], classes=C)
    generator = np.random.default_rng([seed, ord(kind)])
    rename = _renaming(Kind(kind), source, C, generator)
    members = []
    for number in range(tenants + NEWCOMERS):
        labels_C = rename(number)
        sizes = (FEWEST_ROWS, MOST_ROWS + 1) if number < tenants else (NEWCOMER_ROWS, NEWCOMER_ROWS + 1)
        rows_K = _draw(pool_N[labels_C[classes_N[pool_N]] >= 0], int(generator.integers(*sizes)), generator)
        if source.has_rows_for_all:
            pool_N = np.setdiff1d(pool_N, rows_K, assume_unique=True)
        rows_T = _draw(test_N[labels_C[classes_N[test_N]] >= 0], _MOST_TEST_ROWS, generator)
        ceiling = _accuracy(head, labels_C >= 0, inputs_NI[rows_T], classes_N[rows_T])
        own_K, own_T = labels_C[classes_N[rows_K]], labels_C[classes_N[rows_T]]
        members.append(Tenant(inputs_NI[rows_K], own_K, inputs_NI[rows_T], own_T, ceiling))
    return World(weight_CI, bias_C, labels_of(C), tuple(members[:tenants]), tuple(members[tenants:]))


def _draw(rows_N: Classes, count: int, generator: np.random.Generator) -> Classes:
    return generator.permutation(rows_N)[:count]


def _accuracy(head: tuple[Inputs, Inputs], used_C: NDArray[np.bool_], inputs_TI: Inputs, classes_T: Classes) -> float:
    outputs_TC = np.where(used_C, inputs_TI @ head[0].T + head[1], -np.inf)
    return float((outputs_TC.argmax(1) == classes_T).mean())


def _renaming(kind: Kind, source: Source, C: int, generator: np.random.Generator) -> Callable[[int], Classes]:
    """Return a function of the tenant's number; it gives (C,) the output of each class, -1 for those it has not."""

    def renamed(count: int) -> Classes:
        """Return a mapping that moves `count` classes, each to the place of another one."""
        labels_C, moved = np.arange(C), generator.permutation(C)[:count]
        labels_C[moved] = np.roll(moved, 1)
        return labels_C

    def few(classes: Classes, outputs: Classes) -> Classes:
        labels_C = np.full(C, -1)
        labels_C[classes[: source.few]] = outputs[: source.few]
        return labels_C

    industries = [renamed(source.industry) for _ in range(_INDUSTRIES)]
    shared_C = renamed(source.shared)

    def labels(number: int) -> Classes:
        match kind:
            case Kind.INDUSTRIES:
                return renamed(source.own)[industries[number % _INDUSTRIES]]
            case Kind.SHARED:
                return renamed(source.own)[shared_C]
            case Kind.UNRELATED_REMAPS:
                return renamed(source.unrelated)
            case Kind.NO_CHANGE:
                return np.arange(C)
            case Kind.UNSEEN:
                classes = C // 2 + generator.permutation(C - C // 2)
                return few(classes, classes)
            case Kind.UNRELATED_LABELS:
                return few(generator.permutation(C), generator.permutation(C))

    return labels
