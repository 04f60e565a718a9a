import httpx


def test_base(client: httpx.Client) -> None:
    assert client.get("/base").json()["in_features"] == 10
    r = client.put("/adapters/a", json={"A": [[1.0], [2.0]], "B": [[1.0] * 10]})
    assert r.status_code == 201, r.text
