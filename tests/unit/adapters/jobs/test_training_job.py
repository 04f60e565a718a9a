"""Training job: the JSON that the queue stores, from this release and from earlier ones."""

import json
from dataclasses import replace
from typing import Any

import pytest

from adapters.jobs.training_job import JobKind, Provenance, TrainingJob
from adapters.training.evaluation.gate import Gate, When
from adapters.training.planning.split import Split
from adapters.training.settings import Init, Loss, Method, TrainingSpec
from tests.support.catalog_factories import training_job

# Values of the column jobs.spec as commit 152316c wrote them.
CLOSED_FORM = """
{"shown": {"name": "acme", "rank": "auto", "alpha": "auto", "data": {"rows": 12,
"digest": "sha256:02700e12fdb1434c6face1a1f3890e61142a6d8d6d8fd6cebcb54369468b9ceb"},
"training": {"method": "closed_form", "loss": "mse", "seed": 7, "validation_fraction": 0, "ridge": 0},
"publish": {"when": "if_better", "min_rows": 3}, "split": {"by": "rows", "fraction": 0.25, "stratify": false,
"train": {"rows": 9}, "held_out": {"rows": 3}},
"auto": {"method": "squared loss has an exact solution: nothing to tune",
"rank": "the smallest of 1, 2, 3 that is about as good as the best, by held-out loss"}}, "resolved": {"rank": 3,
"alpha": 3.0, "rslora": false, "method": "closed_form", "loss": "mse", "bias": false, "epochs": 50,
"learning_rate": 0.01, "batch_size": 64, "seed": 7, "init": "zero_delta", "split": {"by": "rows", "fraction": 0.25,
"stratify": false}, "ridge": 0, "weight_decay": 0, "momentum": 0, "clip_norm": null, "schedule": "constant",
"warmup_steps": 0, "patience": null, "min_delta": 0.0, "evaluate_every": null, "max_steps": null,
"max_seconds": null, "huber_delta": 1.0, "label_smoothing": 0.0, "class_weights": null, "temperature": 0.05,
"classes": null, "keep_statistics": false, "try_ranks": [1, 2, 3], "try_rates": [], "try_ridges": false,
"alpha_is_rank": true}, "steps": 1, "publish": {"when": "if_better", "metric": "loss", "margin": 0.0, "min_rows": 3},
"fleet": false, "adapters": 1, "labels": null, "update": false, "lineage": {"loss": "mse", "data": {"rows": 12,
"digest": "sha256:02700e12fdb1434c6face1a1f3890e61142a6d8d6d8fd6cebcb54369468b9ceb"}, "split": {"by": "rows",
"fraction": 0.25, "stratify": false}, "seed": 7, "spec": {"rank": 3, "alpha": 3.0, "rslora": false,
"method": "closed_form", "loss": "mse", "bias": false, "epochs": 50, "learning_rate": 0.01, "batch_size": 64,
"seed": 7, "init": "zero_delta", "split": {"by": "rows", "fraction": 0.25, "stratify": false}, "ridge": 0,
"weight_decay": 0, "momentum": 0, "clip_norm": null, "schedule": "constant", "warmup_steps": 0, "patience": null,
"min_delta": 0.0, "evaluate_every": null, "max_steps": null, "max_seconds": null, "huber_delta": 1.0,
"label_smoothing": 0.0, "class_weights": null, "temperature": 0.05, "classes": null, "keep_statistics": false,
"try_ranks": [1, 2, 3], "try_rates": [], "try_ridges": false, "alpha_is_rank": true}, "parent": null,
"prior": null}}
"""
CROSS_ENTROPY = """
{"shown": {"name": "acme", "rank": 2, "alpha": 2.0, "data": {"rows": 12,
"digest": "sha256:2b239d4ba254a484c30e7ff1ed676e2ed4b98dead7a966875809aeb22a34b462"}, "training": {"method": "adamw",
"loss": "cross_entropy", "epochs": 50, "learning_rate": 0.01, "batch_size": null, "seed": 0, "init": "zero_delta",
"validation_fraction": 0.25, "early_stopping": {"patience": 3, "min_delta": 0.0, "evaluate_every": null},
"class_weights": [1, 2]}, "publish": "always", "labels": ["cat", "dog"], "split": {"by": "rows", "fraction": 0.25,
"stratify": false, "train": {"rows": 9, "classes": {"cat": 4, "dog": 5}}, "held_out": {"rows": 3,
"classes": {"cat": 2, "dog": 1}}}, "auto": {"batch_size": "12 rows: all of them in each step"}},
"resolved": {"rank": 2, "alpha": 2.0, "rslora": false, "method": "adamw", "loss": "cross_entropy", "bias": false,
"epochs": 50, "learning_rate": 0.01, "batch_size": null, "seed": 0, "init": "zero_delta", "split": {"by": "rows",
"fraction": 0.25, "stratify": false}, "ridge": 0, "weight_decay": 0, "momentum": 0, "clip_norm": null,
"schedule": "constant", "warmup_steps": 0, "patience": 3, "min_delta": 0.0, "evaluate_every": null,
"max_steps": null, "max_seconds": null, "huber_delta": 1.0, "label_smoothing": 0.0, "class_weights": [1.0, 2.0],
"temperature": 0.05, "classes": 2, "keep_statistics": false, "try_ranks": [], "try_rates": [], "try_ridges": false,
"alpha_is_rank": true}, "steps": 50, "publish": {"when": "always", "metric": "loss", "margin": 0.0, "min_rows": 50},
"fleet": false, "adapters": 1, "labels": ["cat", "dog"], "update": false, "lineage": {"loss": "cross_entropy",
"data": {"rows": 12, "digest": "sha256:2b239d4ba254a484c30e7ff1ed676e2ed4b98dead7a966875809aeb22a34b462"},
"split": {"by": "rows", "fraction": 0.25, "stratify": false}, "seed": 0, "spec": {"rank": 2, "alpha": 2.0,
"rslora": false, "method": "adamw", "loss": "cross_entropy", "bias": false, "epochs": 50, "learning_rate": 0.01,
"batch_size": null, "seed": 0, "init": "zero_delta", "split": {"by": "rows", "fraction": 0.25, "stratify": false},
"ridge": 0, "weight_decay": 0, "momentum": 0, "clip_norm": null, "schedule": "constant", "warmup_steps": 0,
"patience": 3, "min_delta": 0.0, "evaluate_every": null, "max_steps": null, "max_seconds": null, "huber_delta": 1.0,
"label_smoothing": 0.0, "class_weights": [1.0, 2.0], "temperature": 0.05, "classes": 2, "keep_statistics": false,
"try_ranks": [], "try_rates": [], "try_ridges": false, "alpha_is_rank": true}, "parent": null, "prior": null}}
"""


def test_an_evaluation_is_read_as_it_was_written() -> None:
    job = replace(
        training_job(adapters=["acme@3", None]),
        kind=JobKind.EVALUATION,
        adapters=0,
        labels=("a", "b", "c"),
        compared=("acme@3", None),
        output_labels=("b", "a"),
    )
    assert TrainingJob.from_json(json.loads(json.dumps(job.to_json()))) == job


def _part(whole: Any, of: Any) -> Any:
    """The members of `whole`, at every depth, that `of` has too."""
    if not isinstance(whole, dict) or not isinstance(of, dict):
        return whole
    return {name: _part(value, of[name]) for name, value in whole.items() if name in of}


@pytest.mark.parametrize("stored", [CLOSED_FORM, CROSS_ENTROPY])
def test_a_job_of_an_earlier_release_is_read_whole_and_written_so_that_it_can_read_it(stored: str) -> None:
    payload: dict[str, Any] = json.loads(stored)
    job = TrainingJob.from_json(payload)
    assert _part(json.loads(json.dumps(job.to_json())), payload) == payload
    assert TrainingJob.from_json(json.loads(json.dumps(job.to_json()))) == job


@pytest.mark.parametrize("kind", JobKind)
def test_the_kind_of_a_job_is_stored_also_as_an_earlier_release_reads_it(kind: JobKind) -> None:
    job = replace(training_job(), kind=kind, fleet_prior="start", request={"name": "acme"})
    stored = json.loads(json.dumps(job.to_json()))
    assert TrainingJob.from_json(stored) == job
    assert stored["update"] is (kind is JobKind.UPDATE)
    del stored["kind"]
    assert TrainingJob.from_json(stored).is_update is (kind is JobKind.UPDATE)


def test_the_values_of_a_job_of_an_earlier_release_have_their_types() -> None:
    job = TrainingJob.from_json(json.loads(CLOSED_FORM))
    assert job.spec == TrainingSpec(
        rank=3,
        alpha=3.0,
        method=Method.CLOSED_FORM,
        seed=7,
        split=Split(fraction=0.25),
        try_ranks=(1, 2, 3),
        alpha_is_rank=True,
    )
    assert isinstance(job.spec.init, Init)
    assert job.gate == Gate(when=When.IF_BETTER, min_rows=3)
    assert (job.steps, job.adapters, job.is_fleet, job.is_update, job.labels) == (1, 1, False, False, None)
    assert job.provenance.split == {"by": "rows", "fraction": 0.25, "stratify": False}
    classes = TrainingJob.from_json(json.loads(CROSS_ENTROPY))
    assert (classes.labels, classes.spec.loss, classes.spec.class_weights) == (
        ("cat", "dog"),
        Loss.CROSS_ENTROPY,
        (1.0, 2.0),
    )


def test_a_job_from_before_fleets_and_gates_can_be_shown() -> None:
    job = TrainingJob.from_json({"shown": {"data": {"rows": 7}}, "steps": 3, "resolved": {"rank": 2, "alpha": 4.0}})
    assert (job.description, job.steps, job.adapters) == ({"data": {"rows": 7}}, 3, 1)
    assert job.gate == Gate()
    # The first release held rows out by a fraction alone.
    assert TrainingSpec.from_json({"rank": 2, "alpha": 4.0, "validation_fraction": 0.5}).split is None


def test_the_lineage_has_the_settings_that_the_fit_has_chosen() -> None:
    provenance = Provenance(data={"rows": 9}, parent="acme@2", prior="other@1")
    job = replace(training_job(), provenance=provenance)
    chosen = replace(job.spec, rank=5)
    assert job.lineage(chosen)["spec"]["rank"] == 5
    assert job.lineage()["spec"]["rank"] == job.spec.rank
    members = {"data": {"rows": 9}, "split": None, "parent": "acme@2", "prior": "other@1", "loss": "mse", "seed": 0}
    assert members.items() <= job.lineage().items()
