"""A new fit from sums that were kept: with rows added, without rows that are to be forgotten."""

from collections.abc import Sequence

from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.forgetting import forget
from adapters.training.closed_form.solver import loss_of_factors, solve
from adapters.training.closed_form.statistics import Statistics, gather
from adapters.training.data_file import TrainingData
from adapters.training.fit import ROWS_AT_ONCE, Fit
from adapters.training.settings import TrainingSpec


def refit(
    base: BaseLayer,
    kept: Statistics,
    data: TrainingData,
    spec: TrainingSpec,
    *,
    feature_space: str | None,
    labels: Sequence[str | int] | None = None,
) -> Fit:
    """The closed form as if the rows of `data` had been there from the beginning, and its `gone_*` rows never.

    Raises `IllConditioned` where rounding could show, and `Diverged` as `solve` does.
    """
    kept = kept.to(base.device)
    data = data.to(base.device)
    parts = data.parts(None, ROWS_AT_ONCE)
    statistics = kept.plus(gather(base, ((part.inputs_NI, part.targets, part.weights_N) for part in parts)))
    gone = data.gone
    if gone is not None:
        parts = gone.parts(None, ROWS_AT_ONCE)
        forgotten = gather(base, ((part.inputs_NI, part.targets, part.weights_N) for part in parts))
        statistics = forget(
            statistics, forgotten, ridge=spec.ridge, bias=spec.bias, rank=spec.rank, prior_OI=data.prior
        )
    factors = solve(
        statistics, rank=spec.rank, scaling=spec.scaling, ridge=spec.ridge, bias=spec.bias, prior_OI=data.prior
    )
    bare = float(statistics.square) / (statistics.weight * base.out_features)
    loss = loss_of_factors(statistics, factors, scaling=spec.scaling)
    metrics = {
        "train_loss": loss,
        "base_train_loss": bare,
        "validation_loss": None,
        "base_validation_loss": None,
        "rows": statistics.rows,
    }
    names = None if labels is None else tuple(labels)
    adapter = Adapter(factors.a_OR, factors.b_RI, factors.bias_O, spec.alpha, spec.rslora, feature_space, names)
    return Fit(adapter, metrics, [(0, bare), (1, loss)], spec, statistics)
