"""Replicas behind HAProxy: what one has acknowledged holds on the others."""

import numpy as np
import pytest

from tests.support.cluster import Cluster
from tests.support.service import train

pytestmark = pytest.mark.slow


def test_a_training_through_the_proxy_answers_on_every_replica(cluster: Cluster) -> None:
    x_NI = np.random.default_rng(0).standard_normal((120, 10)).round(3)
    rows = {"inputs": x_NI.tolist(), "targets": (x_NI[:, :2] * 3).tolist()}
    job = train(cluster.client, name="trained", data=rows, rank=2, training={"method": "closed_form"})
    assert job["status"] == "succeeded", job["error"]
    request = {"adapter": "trained", "inputs": rows["inputs"][:2]}
    answers = [api.client.post("/predict", json=request).json() for api in cluster.apis]
    assert answers[0]["adapter"]["digest"] == job["result"]["digest"]
    assert answers[0] == answers[1] == cluster.client.post("/predict", json=request).json()
