"""Predictions: as arrays, in one request or several, of one adapter or one a row."""

import asyncio
import re
import threading
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from loraplex import (
    AdapterNotFound,
    AsyncClient,
    BaseMismatch,
    Client,
    FeatureSpaceMismatch,
    InvalidReference,
    NotFinite,
    OutputNotFinite,
    VersionNotFound,
    WrongShape,
    WrongType,
)

from tests.conftest import Serve
from tests.integration.client.conftest import Start

RNG = np.random.default_rng(7)
A_OR = RNG.normal(size=(2, 3)).astype(np.float32)
B_RI = RNG.normal(size=(3, 10)).astype(np.float32)


def base_outputs(x_NI: Any) -> Any:
    """What `random:10,2,42` answers, from its definition."""
    torch.manual_seed(42)
    return x_NI @ torch.randn(2, 10).numpy().T


def adapted(x_NI: Any) -> Any:
    return base_outputs(x_NI) + (x_NI @ B_RI.T) @ A_OR.T


def test_an_adapter_answers_as_its_formula_says(start: Start) -> None:
    client = start()
    version = client.upload("acme", A=A_OR, B=B_RI)
    x = RNG.normal(size=(5, 10))
    answer = client.predict("acme", x)
    assert answer.outputs.dtype == np.float32
    np.testing.assert_allclose(answer.outputs, adapted(x), rtol=1e-4, atol=1e-4)
    assert (answer.adapter.name, answer.adapter.version) == ("acme", version.version)
    np.testing.assert_allclose(client.predict(None, x).outputs, base_outputs(x), rtol=1e-4, atol=1e-4)
    assert client.predict(None, x).adapter is None


def test_what_comes_in_says_what_comes_out(start: Start) -> None:
    client = start()
    client.upload("acme", A=A_OR, B=B_RI)
    rows = RNG.normal(size=(3, 10)).astype(np.float32)
    one = client.predict("acme", rows[0]).outputs
    assert one.shape == (2,)
    assert client.predict("acme", rows.tolist()).outputs.shape == (3, 2)
    tensor = client.predict("acme", torch.from_numpy(rows).requires_grad_()).outputs
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype is torch.float32
    np.testing.assert_allclose(tensor.numpy()[0], one, rtol=1e-5, atol=1e-5)
    narrow = client.predict("acme", torch.from_numpy(rows).to(torch.bfloat16)[0]).outputs
    assert narrow.shape == (2,)
    one[:] = 0  # the caller's own


def test_every_reference_answers_and_says_which_version_it_meant(start: Start) -> None:
    client = start()
    client.upload("acme", A=A_OR, B=B_RI)
    client.upload("acme", A=2 * A_OR, B=B_RI)
    x = RNG.normal(size=(2, 10))
    assert [client.predict(name, x).adapter.version for name in ("acme", "acme@live", "acme@1")] == [2, 2, 1]


def test_each_row_may_have_its_own_adapter(start: Start) -> None:
    client = start()
    first, second = (client.upload(name, A=A_OR * scale, B=B_RI) for name, scale in (("a", 1), ("b", -1)))
    x = RNG.normal(size=(4, 10))
    answer = client.predict(["a", None, "b", "a@1"], x)
    assert answer.row_adapters == (0, None, 1, 0)
    assert [(ref.name, ref.digest) for ref in answer.adapters] == [("a", first.digest), ("b", second.digest)]
    expected = [adapted(x)[0], base_outputs(x)[1], 2 * base_outputs(x)[2] - adapted(x)[2], adapted(x)[3]]
    np.testing.assert_allclose(answer.outputs, expected, rtol=1e-4, atol=1e-3)


def test_more_rows_than_one_request_may_have_go_in_several(start: Start) -> None:
    client = start()
    client.upload("acme", A=A_OR, B=B_RI)
    x = RNG.normal(size=(9000, 10)).astype(np.float32)
    answer = client.predict("acme", x)
    np.testing.assert_allclose(answer.outputs, adapted(x), rtol=1e-3, atol=1e-3)
    by_row = client.predict(["acme", None] * 4500, x)
    np.testing.assert_allclose(by_row.outputs[1::2], base_outputs(x)[1::2], rtol=1e-3, atol=1e-3)
    assert by_row.row_adapters == (0, None) * 4500


def test_a_service_that_takes_fewer_rows_gets_fewer_in_each_request(start: Start) -> None:
    client = start(max_rows=100)
    x = RNG.normal(size=(250, 10)).astype(np.float32)
    np.testing.assert_allclose(client.predict(None, x).outputs, base_outputs(x), rtol=1e-3, atol=1e-3)
    assert len(client.classify(None, x)) == 250


@pytest.mark.parametrize("by_row", [False, True])
def test_all_parts_are_answered_by_the_version_that_answered_the_first(serve: Serve, by_row: bool) -> None:
    http, _ = serve()
    with Client(str(http.base_url)) as other:
        other.upload("acme", A=A_OR, B=B_RI)
        with Client(str(http.base_url), transport=_AfterTheFirst(other)) as client:
            x = RNG.normal(size=(5000, 10)).astype(np.float32)
            answer = client.predict(["acme"] * 5000 if by_row else "acme", x)
        np.testing.assert_allclose(answer.outputs, adapted(x), rtol=1e-3, atol=1e-3)
        assert [str(ref) for ref in (answer.adapters if by_row else [answer.adapter])] == ["acme@1"]
        assert other.adapter("acme").aliases == {"live": 2}


class _AfterTheFirst(httpx.HTTPTransport):
    """Publishes another version once the first request is answered."""

    def __init__(self, other: Client) -> None:
        super().__init__()
        self._other = other
        self._answered = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        self._answered += 1
        if self._answered == 1:
            self._other.upload("acme", A=-A_OR, B=B_RI)
        return response


def test_what_the_binary_form_says_only_in_words_is_raised_as_its_own_error(start: Start) -> None:
    client = start()
    client.upload("acme", A=A_OR, B=B_RI)
    x = RNG.normal(size=(2, 10))
    with pytest.raises(AdapterNotFound, match="nobody") as missing:
        client.predict("nobody", x)
    assert (missing.value.status, missing.value.code) == (404, "adapter_not_found")
    assert missing.value.request_id
    with pytest.raises(VersionNotFound):
        client.predict("acme@9", x)
    with pytest.raises(InvalidReference):
        client.predict("acme@", x)
    with pytest.raises(WrongShape, match="10"):
        client.predict("acme", RNG.normal(size=(2, 9)))


def test_the_row_of_an_error_counts_from_the_first_row_of_all(start: Start) -> None:
    client = start()
    client.upload("huge", A=np.full((2, 1), 1e38), B=np.full((1, 10), 1.0))
    x = np.zeros((5000, 10), np.float32)
    x[4500] = 1e30
    with pytest.raises(OutputNotFinite) as failed:
        client.predict("huge", x)
    assert failed.value.row == 4500


@pytest.mark.parametrize("bad", [1000, 3000, 7000])
def test_the_row_of_an_error_is_found_wherever_it_is_in_a_request(start: Start, bad: int) -> None:
    client = start(base="random:64,2,1")
    client.upload("huge", A=np.full((2, 1), 1e38), B=np.full((1, 64), 1.0))
    x = np.zeros((8000, 64), np.float32)
    x[bad] = 1e30
    with pytest.raises(OutputNotFinite) as failed:
        client.predict("huge", x)
    assert failed.value.row == bad
    counted = [int(row) for row in re.findall(r"row (\d+)", failed.value.detail)]
    assert sum(counted) == bad


def test_what_is_no_number_never_leaves(start: Start) -> None:
    client = start()
    x = RNG.normal(size=(3, 10))
    x[1, 4] = np.nan
    with pytest.raises(NotFinite, match="row 1, column 4") as failed:
        client.predict(None, x)
    assert (failed.value.row, failed.value.status) == (1, None)
    x[1, 4] = 1e39
    with pytest.raises(NotFinite):
        client.predict(None, x)
    with pytest.raises(WrongType, match="no encoder"):
        client.predict(None, ["a text"])
    with pytest.raises(WrongShape, match="differ in length"):
        client.predict(None, [[1.0], [1.0, 2.0]])
    with pytest.raises(WrongShape):
        client.predict(None, np.zeros((0, 10)))
    with pytest.raises(WrongShape, match="1 adapters for 3 rows"):
        client.predict(["acme"], np.zeros((3, 10)))


def test_classes_come_with_their_probabilities(start: Start) -> None:
    client = start()
    client.upload("acme", A=A_OR, B=B_RI, labels=["cat", "dog"])
    x = RNG.normal(size=(5, 10))
    outputs = torch.from_numpy(adapted(x))
    expected = torch.softmax(outputs, dim=1).numpy()
    for row, labels in enumerate(client.classify("acme", x, top_k=2)):
        best = int(outputs[row].argmax())
        assert [label.label for label in labels] == [["cat", "dog"][best], ["cat", "dog"][1 - best]]
        assert labels[0].probability == pytest.approx(expected[row, best], rel=1e-3)
    assert [[label.label for label in row] for row in client.classify(None, x[:1], top_k=1)] == [
        [int(base_outputs(x)[0].argmax())]
    ]


def test_texts_go_in_where_an_encoder_is_at_hand(start: Start) -> None:
    threads: list[int] = []

    def encode(texts: list[str]) -> torch.Tensor:
        threads.append(threading.get_ident())
        return torch.tensor([[float(len(text))] * 10 for text in texts])

    client = start(feature_space="length@1", client={"encode": encode, "feature_space": "length@1"})
    by_hand = base_outputs(np.array([[2.0] * 10, [3.0] * 10]))
    np.testing.assert_allclose(client.predict(None, ["ab", "abc"]).outputs, by_hand, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(client.predict(None, "ab").outputs, by_hand[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(client.predict(None, np.array(["ab", "abc"])).outputs, by_hand, rtol=1e-4, atol=1e-4)
    assert len(client.classify(None, ["ab", "abc"])) == 2
    assert len(threads) == 4


def test_another_encoder_than_the_layers_is_refused_on_every_call(start: Start) -> None:
    client = start(feature_space="größe@1", client={"feature_space": "other@1"})
    for call in (
        lambda: client.predict(None, np.zeros((1, 10))),
        lambda: client.classify(None, np.zeros((1, 10))),
        lambda: list(client.adapters()),
        lambda: client.train("acme", rank=1, inputs=np.zeros((2, 10)), targets=np.zeros((2, 2))),
    ):
        with pytest.raises(FeatureSpaceMismatch):
            call()


def test_a_feature_space_may_have_any_letters(start: Start) -> None:
    client = start(feature_space="größe@1", client={"feature_space": "größe@1"})
    assert client.predict(None, np.zeros((1, 10))).outputs.shape == (1, 2)


def test_a_version_of_another_base_is_refused_as_such(serve: Serve, start: Start) -> None:
    start().upload("acme", A=A_OR, B=B_RI)
    client = start(base="random:10,2,43")
    with pytest.raises(BaseMismatch):
        client.predict("acme", np.zeros((1, 10)))


def test_threads_share_a_client(serve: Serve) -> None:
    http, _ = serve()
    x = RNG.normal(size=(20, 10)).astype(np.float32)
    found: list[np.ndarray] = [np.zeros(0)] * 20
    with Client(str(http.base_url)) as client:

        def ask(row: int) -> None:
            found[row] = client.predict(None, x[row]).outputs

        threads = [threading.Thread(target=ask, args=(row,)) for row in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    np.testing.assert_allclose(found, base_outputs(x), rtol=1e-4, atol=1e-4)


def test_many_tasks_share_an_async_client_and_its_encoder_does_not_hold_them_up(serve: Serve) -> None:
    http, _ = serve()
    going_on = threading.Event()

    def encode(texts: list[str]) -> np.ndarray:
        assert going_on.wait(30)
        return np.zeros((len(texts), 10))

    async def ask() -> None:
        async with AsyncClient(str(http.base_url), encode=encode) as client:
            slow = asyncio.create_task(client.predict(None, ["a text"]))
            answers = await asyncio.gather(*(client.predict(None, np.zeros(10)) for _ in range(5)))
            going_on.set()
            assert len(answers) == 5
            assert (await slow).outputs.shape == (1, 2)

    asyncio.run(ask())
