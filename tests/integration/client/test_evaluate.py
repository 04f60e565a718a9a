"""`evaluate`: several adapters side by side on rows of any form, and the rows with doubtful labels."""

import numpy as np
import pandas as pd
import pytest
from loraplex import AdapterNotFound, EvaluationResult, InvalidCombination, Suspect, training_rows
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from tests.integration.client.conftest import Connect, Start
from tests.integration.client.scripted_server import Scripted, reply

RNG = np.random.default_rng(7)
X, FRESH = RNG.normal(size=(60, 10)), RNG.normal(size=(90, 10))
NAMES = np.array(["no", "yes"])
CLASSES, TRUTH = (NAMES[(rows[:, 0] + 0.3 * rows[:, 1] > 0).astype(int)] for rows in (X, FRESH))
TRAINING = {"method": "adamw", "loss": "cross_entropy", "epochs": 30, "learning_rate": 0.05}


@pytest.mark.parametrize("inline_numbers", [training_rows.INLINE_NUMBERS, 100], ids=["inline", "as a data set"])
def test_adapters_are_evaluated_on_arrays(start: Start, monkeypatch: pytest.MonkeyPatch, inline_numbers: int) -> None:
    client = start(trainer=True)
    client.train("short", rank=1, inputs=X[:10], targets=CLASSES[:10], training=TRAINING).wait()
    client.train("long", rank=2, inputs=X, targets=CLASSES, training=TRAINING).wait()
    monkeypatch.setattr(training_rows, "INLINE_NUMBERS", inline_numbers)
    job = client.evaluate(["short", "long@1", None], inputs=FRESH, targets=TRUTH, labels=["no", "yes"]).wait()
    assert job.spec["adapters"] == ["short@1", "long@1", None]
    result = job.result
    assert isinstance(result, EvaluationResult)
    assert (result.metric, result.rows) == ("accuracy", 90)
    assert [entry.adapter for entry in result.adapters] == ["short@1", "long@1", None]
    outputs = [client.predict(adapter, FRESH).outputs for adapter in ("short", "long", None)]
    said = [NAMES[output.argmax(1)] for output in outputs]
    for entry, answers in zip(result.adapters, said, strict=True):
        assert entry.figure == pytest.approx(np.mean(answers == TRUTH))
        precision, recall, f1, rows = precision_recall_fscore_support(TRUTH, answers, labels=["no", "yes"])
        assert entry.classes is not None
        assert [figures.label for figures in entry.classes] == ["no", "yes"]
        found = np.array([(figures.precision, figures.recall, figures.f1, figures.rows) for figures in entry.classes])
        np.testing.assert_allclose(found, np.stack([precision, recall, f1, rows], 1))
        np.testing.assert_array_equal(entry.confusion, confusion_matrix(TRUTH, answers))
    assert result.adapters[0].gain is None
    assert result.adapters[1].gain == pytest.approx(np.mean(said[1] == TRUTH) - np.mean(said[0] == TRUTH))
    assert list(client.datasets()) == []
    frame = result.to_pandas()
    assert frame["adapter"].tolist()[:2] == ["short@1", "long@1"]
    assert frame["metrics.accuracy"].tolist() == [entry.figure for entry in result.adapters]
    assert "long@1" in result._repr_html_()


def test_the_rows_may_be_a_data_frame(start: Start) -> None:
    client = start()
    table = pd.DataFrame(FRESH, columns=[f"x{column}" for column in range(10)]).assign(answer=TRUTH)
    spec = client.evaluate([None], data=table, targets="answer").spec
    assert (spec["loss"], spec["labels"], spec["data"]["rows"]) == ("cross_entropy", ["no", "yes"], 90)


def test_one_adapter_needs_no_list_and_rows_are_needed(start: Start) -> None:
    client = start()
    assert client.evaluate(None, inputs=FRESH, targets=[0, 1] * 45).spec["adapters"] == [None]
    with pytest.raises(AdapterNotFound) as nobody:
        client.evaluate([None, "nobody"], inputs=FRESH, targets=TRUTH)
    assert (nobody.value.field, nobody.value.row) == ("adapters", 1)
    with pytest.raises(InvalidCombination):
        client.evaluate("acme")


def test_suspects_come_page_by_page(scripted: Scripted, connect: Connect) -> None:
    row = {"row": 7, "label": "no", "suggested": "yes", "score": 2.5}
    pages = [{"data": [row], "next_cursor": "more"}, {"data": [row | {"row": 3, "score": 1.0}], "next_cursor": None}]
    scripted.plan([reply(200, page) for page in pages])
    client = connect(scripted.url)
    assert list(client.suspects("5f0c2a91")) == [Suspect(7, "no", "yes", 2.5), Suspect(3, "no", "yes", 1.0)]
