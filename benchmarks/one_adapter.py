"""One adapter with the defaults and enough rows: classes, regression, and rows with wrong labels."""

# N rows · T test rows · I in_features · O out_features · C classes
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cleanlab.rank import get_label_quality_scores
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes, load_linnerud
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from adapters.lora.base_layer import BaseLayer
from adapters.training.candidates.auto_fit import fit_auto
from adapters.training.candidates.scores import Scores
from adapters.training.candidates.suspects import MAX_SUSPECTS, find_suspects
from adapters.training.candidates.task import FitTask
from adapters.training.data_file import TrainingData
from adapters.training.settings import Candidate
from benchmarks.failures import BenchFailed
from benchmarks.jobs import arrow_stream, columns_of, predict, read, seconds_of, serving_layer, train, upload
from benchmarks.processes import Server
from benchmarks.progress import say
from benchmarks.references import base_layer, closed_form_spec, outputs_of, tuned_head, tuned_peft
from benchmarks.worlds import Classes, Inputs, labels_of, logistic_head, rows_of

Json = dict[str, Any]
Floats = NDArray[np.float64]

LARGE = {"digits": (200, 1_000), "texts": (5_000, 4_000)}
"""Rows of the base layer, and of the adapter; the others are test rows."""
_RENAMED_SHARE = 0.5
ERROR_ROWS, FLIPPED = 400, 40
_CLOSED_FORM = (Candidate.BASE, Candidate.RIDGE, Candidate.RIDGE_IN_BASE_METRIC, Candidate.OWN_HEAD)
"""With AdamW beside them, a job takes longer."""
_FOLDS = 5
_ROWS_PER_REQUEST = 1_000
_CALIFORNIA_ROWS = 20_640


def measure_large(data: str, seed: int, folder: Path) -> Json:
    """Train on 1,000 rows or more, half of whose classes are renamed; return the test accuracies."""
    inputs_NI, classes_N = rows_of(data)
    C, generator = int(classes_N.max()) + 1, np.random.default_rng(seed)
    base_rows, rows = LARGE[data]
    base_N, training_N, test_N = np.split(generator.permutation(len(classes_N)), [base_rows, base_rows + rows])
    weight_CI, bias_C = logistic_head(inputs_NI[base_N], classes_N[base_N], classes=C)
    moved, renamed_C = generator.permutation(C)[: int(_RENAMED_SHARE * C)], np.arange(C)
    renamed_C[moved] = np.roll(moved, 1)
    own_N, labels = renamed_C[classes_N], labels_of(C)
    x_NI, y_N, x_TI = inputs_NI[training_N], own_N[training_N], inputs_NI[test_N]
    base = base_layer(weight_CI, bias_C)
    predicted = {"base": outputs_of(base, None, x_TI).argmax(1), "cv": tuned_head(x_NI, y_N, x_TI)}
    predicted["peft"], rate = tuned_peft(base, x_NI, y_N, x_TI, seed=seed)
    with serving_layer(folder, weight_CI, bias_C, labels) as server:
        job = _train(server, "auto", x_NI, [labels[number] for number in y_N])
        predicted["auto"] = np.argmax(_outputs(server, "auto", x_TI), axis=1)
    accuracy = {name: float((classes_T == own_N[test_N]).mean()) for name, classes_T in predicted.items()}
    say(f"quality: {data} {seed}, {rows:,} rows: " + ", ".join(f"{name} {own:.4f}" for name, own in accuracy.items()))
    return {
        "data": data,
        "seed": seed,
        "rows": rows,
        "test_rows": len(test_N),
        "accuracy": accuracy,
        "peft_rate": rate,
        "job_seconds": seconds_of(job),
        "taken": job["auto"]["taken"],
        "reported": job["evaluation"]["adapter"],
    }


class _Regression(NamedTuple):
    inputs_NI: Inputs
    targets_NO: Inputs


def _california_like() -> _Regression:
    """Return rows with the scales, the skewness and the correlations of the California housing columns."""
    generator = np.random.default_rng(29)
    N, normal = _CALIFORNIA_ROWS, generator.standard_normal
    income, age = np.exp(1.25 + 0.47 * normal(N)), generator.integers(1, 53, N)
    rooms, bedrooms = np.exp(1.65 + 0.25 * normal(N)), np.exp(0.07 + 0.12 * normal(N))
    population, occupants = np.exp(7.0 + 0.7 * normal(N)), 2.0 + np.exp(0.3 * normal(N))
    latitude = 35.6 + 2.1 * normal(N)
    longitude = -119.6 - 0.87 * (latitude - 35.6) + 0.8 * normal(N)
    value = 0.44 * income + 0.009 * age - 0.1 * rooms + 0.6 * bedrooms - 0.1 * occupants
    value += -0.42 * latitude - 0.43 * longitude - 36.6 + 0.65 * normal(N)
    columns = (income, age, rooms, bedrooms, population, occupants, latitude, longitude)
    return _Regression(np.stack(columns, 1).astype(np.float32), value.clip(0.15, 5.0)[:, None].astype(np.float32))


def _bundled(load: Any) -> _Regression:
    inputs_NI, targets_N = load(return_X_y=True)
    return _Regression(inputs_NI.astype(np.float32), targets_N.reshape(len(inputs_NI), -1).astype(np.float32))


def measure_regression(folder: Path) -> list[Json]:
    """Return R² of the defaults beside that of RidgeCV on standardised columns, by table and base layer."""
    tables = {
        "diabetes": _bundled(load_diabetes),
        "linnerud": _bundled(load_linnerud),
        "California-like": _california_like(),
    }
    records = []
    for name, table in tables.items():
        I, O = table.inputs_NI.shape[1], table.targets_NO.shape[1]
        random_OI = np.random.default_rng(1).standard_normal((O, I), dtype=np.float32)
        for base, weight_OI in (("zero", np.zeros((O, I), np.float32)), ("random", random_OI)):
            with serving_layer(folder / f"{name}-{base}", weight_OI, np.zeros(O, np.float32)) as server:
                records.append({"data": name, "base": base} | _cross_validate(server, table))
            say(f"quality: {name}, {base} base: R² {records[-1]['auto']:.4f}, RidgeCV {records[-1]['ridge']:.4f}")
    return records


def _cross_validate(server: Server, table: _Regression) -> Json:
    """Return R² of both on the test rows of all folds; one fold if there are many rows."""
    inputs_NI, targets_NO = table
    folds = list(KFold(_FOLDS, shuffle=True, random_state=0).split(inputs_NI))
    if len(inputs_NI) > _CALIFORNIA_ROWS // 2:
        folds = folds[:1]
    truth, ours, theirs, jobs = [], [], [], []
    for number, (training_N, test_N) in enumerate(folds):
        x_NI, y_NO, x_TI = inputs_NI[training_N], targets_NO[training_N], inputs_NI[test_N]
        jobs.append(_train(server, f"fold-{number}", x_NI, y_NO))
        # Version 1, so that there is an answer if it is not live.
        ours.append(_outputs(server, f"fold-{number}@1", x_TI))
        ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 4, 29)))
        theirs.append(ridge.fit(x_NI, y_NO).predict(x_TI).reshape(len(x_TI), -1))
        truth.append(targets_NO[test_N])
    known_TO = np.concatenate(truth)
    return {
        "rows": len(inputs_NI),
        "folds": len(folds),
        "auto": float(r2_score(known_TO, np.concatenate(ours))),
        "ridge": float(r2_score(known_TO, np.concatenate(theirs))),
        "live": sum(job["decision"]["moved"] for job in jobs),
        "unsafe": sum(map(_is_unsafe, jobs)),
        "taken": dict(Counter(job["auto"]["taken"] for job in jobs)),
    }


def _is_unsafe(job: Json) -> bool:
    """Whether the adapter lost to the mean of the targets (R² < 0), and yet moved live or came without a warning."""
    evaluation = job["evaluation"]
    return evaluation["adapter"] > evaluation["guess"] and (job["decision"]["moved"] or not job["warnings"])


def measure_label_errors(data: str, seed: int, folder: Path) -> Json:
    """Flip a tenth of the labels of 400 rows; return the area under the ROC of the suspects and of cleanlab."""
    inputs_NI, classes_N = rows_of(data)
    C, generator = int(classes_N.max()) + 1, np.random.default_rng(seed)
    base_N, own_N = np.split(generator.permutation(len(classes_N))[: LARGE[data][0] + ERROR_ROWS], [-ERROR_ROWS])
    x_NI, given_N = inputs_NI[own_N], classes_N[own_N].copy()
    flipped_K = generator.permutation(ERROR_ROWS)[:FLIPPED]
    given_N[flipped_K] = (given_N[flipped_K] + generator.integers(1, C, FLIPPED)) % C
    is_flipped_N = np.isin(np.arange(ERROR_ROWS), flipped_K)
    trained = logistic_head(inputs_NI[base_N], classes_N[base_N], classes=C)
    untrained = (np.zeros_like(trained[0]), np.zeros_like(trained[1]))
    record: Json = {"data": data, "seed": seed, "rows": ERROR_ROWS, "flipped": FLIPPED}
    for name, (weight_CI, bias_C) in {"trained": trained, "zero": untrained}.items():
        with serving_layer(folder / name, weight_CI, bias_C, labels_of(C)) as server:
            job = _train(server, "auto", x_NI, [labels_of(C)[number] for number in given_N])
            suspects = read(server, f"/jobs/{job['id']}/suspects?limit={MAX_SUSPECTS}")["data"]
        # A row that is not listed is less suspect than the listed ones.
        score_N = np.full(ERROR_ROWS, min(suspect["score"] for suspect in suspects) - 1.0)
        for suspect in suspects:
            score_N[suspect["row"]] = suspect["score"]
        record[name] = {"area": float(roc_auc_score(is_flipped_N, score_N)), "job_seconds": seconds_of(job)}
    record |= _suspect_seconds(base_layer(*trained), x_NI, given_N)
    begin = time.perf_counter()
    shares_NC = cross_val_predict(
        LogisticRegression(C=10, max_iter=1_000), x_NI, given_N, cv=_FOLDS, method="predict_proba"
    )
    quality_N = get_label_quality_scores(given_N, shares_NC)
    record["cleanlab"] = {
        "area": float(roc_auc_score(is_flipped_N, -quality_N)),
        "seconds": time.perf_counter() - begin,
    }
    say(
        "quality: label errors of {} {}: trained base {:.3f}, zero base {:.3f}, cleanlab {:.3f}".format(
            data, seed, *(record[name]["area"] for name in ("trained", "zero", "cleanlab"))
        )
    )
    return record


def _suspect_seconds(base: BaseLayer, inputs_NI: Inputs, classes_N: Classes) -> Json:
    """Return the seconds of a fit with its suspects, and those of the suspects alone."""
    data = TrainingData(torch.from_numpy(inputs_NI), torch.from_numpy(classes_N))
    spec, labels = closed_form_spec(base, _CLOSED_FORM), labels_of(int(classes_N.max()) + 1)
    begin = time.perf_counter()
    fit_auto(base, data, spec, labels=labels)
    fitted = time.perf_counter()
    find_suspects(FitTask(base, data, spec, Scores(spec.loss), labels, None, {}), torch.arange(data.rows))
    return {"seconds": fitted - begin, "suspect_seconds": time.perf_counter() - fitted}


def _train(server: Server, name: str, inputs_NI: Inputs, targets: Any) -> Json:
    """Train with the defaults."""
    upload(server, f"{name}-rows", arrow_stream(x=inputs_NI, y=targets))
    return train(server, {"name": name, "data": columns_of(f"{name}-rows")})


def _outputs(server: Server, reference: str, inputs_TI: Inputs) -> Any:
    outputs: list[list[float]] = []
    for begin in range(0, len(inputs_TI), _ROWS_PER_REQUEST):
        answer = predict(server, reference, inputs_TI[begin : begin + _ROWS_PER_REQUEST])
        if answer is None:
            raise BenchFailed(f"{reference} has no version that answers")
        outputs += answer["outputs"]
    return np.array(outputs)
