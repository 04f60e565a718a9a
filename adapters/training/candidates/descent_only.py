"""The choice between the base layer and AdamW, for losses without a closed form or with settings of AdamW alone."""

# K rows of one adapter · C outputs of the task
import torch
from torch import Tensor

from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.candidates import small
from adapters.training.candidates.descent import Descent, adamw_spec, choose_descent, split_in_parts, train_descent
from adapters.training.candidates.fit_result import AutoFit, Tried, finish
from adapters.training.candidates.scores import LINEAR_LOSSES, Scores
from adapters.training.candidates.task import FitTask
from adapters.training.closed_form.solver import Factors
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import evaluate_factors
from adapters.training.evaluation.row_errors import replace_trained_errors
from adapters.training.fit import Watcher
from adapters.training.gradient.losses import compute_outputs, document_ids, row_losses, target_columns
from adapters.training.settings import Candidate, TrainingSpec

# Rows of an adapter from which AdamW chooses by a part of the training rows.
_MIN_CHOOSING_ROWS = 10


def fit_descent_only(task: FitTask, rows_K: Tensor, position: int, watcher: Watcher) -> AutoFit:
    """Fit one adapter; the base layer is taken if AdamW is not better on training rows that it was not trained on."""
    sides = task.sides(rows_K)
    training_K = sides.training_K
    descent, base_loss = _choose(task, training_K)
    figures = {
        Candidate.BASE: (base_loss, {}),
        Candidate.ADAMW: (descent.loss, {"learning_rate": descent.spec.learning_rate, "steps": descent.spec.max_steps}),
    }
    taken = Candidate.ADAMW if descent.loss < base_loss else Candidate.BASE
    reason = "it has the lowest loss on training rows that were left out"
    factors = _fit(task, descent, base_loss, training_K, watcher)
    adapter = Adapter(*factors, descent.spec.alpha, descent.spec.rslora, **task.names)
    errors: dict[str, Tensor] = {}
    held = sides.held
    if held is not None:
        errors = _errors(task, held, descent.spec, {"adapter": factors, "base": None})
        errors["guess"] = _guess_errors(task, task.data.take(training_K), held, descent.spec)
    elif sides.is_cross_validated and len(training_K) > 1:
        errors = _fold_errors(task, training_K)
    live = task.live.get(position)
    if errors and live is not None and live.adapter is not None:
        table = task.data.take(training_K) if held is None else held
        own = Factors(live.adapter.a_OR, live.adapter.b_RI, live.adapter.bias_O)
        spec = adamw_spec(task.spec, bias=True)
        errors["live"] = _row_errors(task.base, table, spec, own, live.adapter.scaling)
        errors = replace_trained_errors(errors, live, table, None, task.labels)
    tried = Tried(task.scores, "held_out", taken, reason, figures)
    return finish(task, position, adapter, sides, tried, errors, others_gain=None, descent=descent)


def _choose(task: FitTask, training_K: Tensor) -> tuple[Descent, float]:
    """Return the chosen settings of AdamW, and the loss of the base layer on the same rows."""
    spec, bias = task.spec, task.spec.bias or task.spec.try_bias
    if len(training_K) < _MIN_CHOOSING_ROWS:
        return Descent(adamw_spec(spec, bias=bias), float("inf")), 0.0
    parts = split_in_parts(task.keys(training_K), training_K, 1)
    descent = choose_descent(task.base, task.data, spec, parts, bias=bias)
    documents_N = document_ids(descent.spec, task.data.targets)
    return descent, evaluate_factors(task.base, task.data, parts[0][1], descent.spec, None, documents_N)["loss"]


def _fit(task: FitTask, descent: Descent, base_loss: float, rows_K: Tensor, watcher: Watcher) -> Factors:
    """Return the factors of what was chosen; zeros for the base layer."""
    if descent.loss < base_loss:
        return train_descent(task.base, task.data, descent.spec, rows_K, watcher.checkpoint)[0]
    O, I, rank = task.base.out_features, task.base.in_features, descent.spec.rank
    return Factors(torch.zeros(O, rank), torch.zeros(rank, I), None)


def _fold_errors(task: FitTask, training_K: Tensor) -> dict[str, Tensor]:
    """Return the errors of each row by fits without its fold, in which everything is chosen again."""
    classes_K = task.data.targets[training_K] if task.data.targets.dtype == torch.int64 else None
    folds_K = small.outer_folds(task.keys(training_K), classes_K, task.spec.seed)
    table = task.data.take(training_K)
    errors = {name: torch.zeros(len(training_K), dtype=torch.float64) for name in ("adapter", "base", "guess")}
    for fold in folds_K.unique().tolist():
        test_K = (folds_K == fold).nonzero()[:, 0]
        rest_K = training_K[folds_K != fold]
        if len(rest_K) == 0:
            rest_K = training_K
        descent, base_loss = _choose(task, rest_K)
        factors = _fit(task, descent, base_loss, rest_K, Watcher())
        part = table.take(test_K)
        of_fold = _errors(task, part, descent.spec, {"adapter": factors, "base": None})
        errors["adapter"][test_K], errors["base"][test_K] = of_fold["adapter"], of_fold["base"]
        errors["guess"][test_K] = _guess_errors(task, task.data.take(rest_K), part, descent.spec)
    weights_N = torch.ones(len(training_K)) if table.weights_N is None else table.weights_N
    return errors | {"weights": weights_N.double()}


def _errors(
    task: FitTask, table: TrainingData, spec: TrainingSpec, entries: dict[str, Factors | None]
) -> dict[str, Tensor]:
    weights_N = torch.ones(table.rows) if table.weights_N is None else table.weights_N
    errors = {name: _row_errors(task.base, table, spec, own, spec.scaling) for name, own in entries.items()}
    return errors | {"weights": weights_N.double()}


def _row_errors(
    base: BaseLayer, table: TrainingData, spec: TrainingSpec, factors: Factors | None, scaling: float
) -> Tensor:
    """Return the error of each row, (K,) float64."""
    y_KO = compute_outputs(base, table.inputs_NI, factors, scaling)
    return _errors_of(y_KO, table, spec)


def _errors_of(y_KO: Tensor, table: TrainingData, spec: TrainingSpec) -> Tensor:
    """Return the error of each row that a judgement counts: its loss, if the loss has no other."""
    if spec.loss in LINEAR_LOSSES:
        scores, y_KC = Scores(spec.loss), y_KO[:, : spec.classes].double()
        return scores.errors(y_KC, scores.wide(table.targets, y_KC.shape[1]))
    documents_K = document_ids(spec, table.targets)
    targets = table.targets if table.targets.dtype == torch.int64 else table.targets.double()
    documents_1K = None if documents_K is None else documents_K.unsqueeze(0)
    return row_losses(spec, y_KO.T.unsqueeze(0), target_columns(targets.unsqueeze(0)), documents_1K)[0]


def _guess_errors(task: FitTask, training: TrainingData, table: TrainingData, spec: TrainingSpec) -> Tensor:
    """Return the error of each row of the best constant: class frequencies, or the mean of the targets."""
    C = task.outputs
    if training.targets.dtype == torch.int64:
        counts_C = torch.bincount(training.targets, minlength=C).double()
        constant_O = ((counts_C + 1e-9) / counts_C.sum()).log()
    else:
        constant_O = training.targets.double().mean(0)
        if task.scores.is_shares:
            constant_O = torch.logit(constant_O, eps=1e-9)
    return _errors_of(constant_O.expand(table.rows, -1), table, spec)
