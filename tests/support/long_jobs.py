"""Training jobs that last as long as a test wants them to."""

import httpx

from tests.support.service import eventually


def submit(client: httpx.Client, name: str = "acme", *, epochs: int = 1) -> str:
    """Queue a job of `epochs` steps; returns its id."""
    features, outputs = (client.get("/base").json()[side] for side in ("in_features", "out_features"))
    data = {"inputs": [[1.0] * features, [2.0] * features], "targets": [[1.0] * outputs, [3.0] * outputs]}
    training = {"method": "sgd", "learning_rate": 1e-6, "epochs": epochs}
    answer = client.post("/adapters", json={"name": name, "rank": 2, "data": data, "training": training})
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def submit_endless(client: httpx.Client, name: str = "acme") -> str:
    """Queue a job that no test waits for."""
    return submit(client, name, epochs=10_000_000)


def wait_until_it_steps(client: httpx.Client, job_id: str, *, attempt: int = 1) -> None:
    """Returns once the fit of this attempt has made steps."""

    def steps() -> bool:
        job = client.get(f"/jobs/{job_id}").json()
        assert job["status"] in ("queued", "running"), job
        return bool(job["status"] == "running" and job["attempt"] == attempt and job["progress"]["step"])

    eventually(steps, what=f"progress of job {job_id} on attempt {attempt}")


def wait_until_it_runs(client: httpx.Client, job_id: str, *, attempt: int = 1) -> None:
    """Returns once a trainer has claimed it for this attempt."""

    def runs() -> bool:
        job = client.get(f"/jobs/{job_id}").json()
        return bool(job["status"] == "running" and job["attempt"] == attempt)

    eventually(runs, what=f"attempt {attempt} of job {job_id}")


def versions(client: httpx.Client, name: str = "acme") -> list[int]:
    """The numbers of an adapter's versions, newest first; none where there is no such adapter."""
    answer = client.get(f"/adapters/{name}/versions")
    return [] if answer.status_code == 404 else [version["version"] for version in answer.json()["data"]]
