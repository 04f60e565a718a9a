"""Deploys the stack as docker-compose.yml says, uses it as a team would, and takes it down again.

Builds the image, uploads a data set, trains an adapter from it, asks it, takes the stack down and up, and asks again:
the same digest and the same outputs must come back. The stack has a project name, an image, a volume and a port of its
own, so that it never meets a person's; only the image stays, for its layers.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "demo" / "digits.npz"
COMPOSE = (
    *("docker", "compose", "--ansi", "never", "--env-file", os.devnull),
    *("--project-name", "loraplex-check", "--file", "docker-compose.yml"),
)
SERVICES = ("api", "trainer")
SCALE = ("docker", "compose", "--ansi", "never", "--file", "deploy/compose.scale.yml")
SECRETS = ("POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
METRICS_SECONDS = 10
# Empty: torch from where pip finds it by itself. Port 0: any free one. A person's settings, and .env, stay out.
ENVIRONMENT: Mapping[str, str] = {
    "TORCH_EXTRA_INDEX_URL": "",
    **{name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")},
    "LORAPLEX_PORT": "0",
}
JOB_SECONDS = 60
ROWS = 200
"""Digits that are trained on."""
PROBE = """
import json, os
status = open("/proc/self/status").read()
print(json.dumps({
    "uid": os.getuid(),
    "root_read_only": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
    "data_writable": os.access("/data", os.W_OK),
    "capabilities": int(status.split("CapBnd:")[1].split()[0], 16),
    "no_new_privileges": status.split("NoNewPrivs:")[1].split()[0] == "1",
}))
"""
CONFINED = {"root_read_only": True, "data_writable": True, "capabilities": 0, "no_new_privileges": True}


class CheckFailed(Exception):
    """The stack ran, and did something else than it should."""


def expect(condition: object, message: str) -> None:
    """Raise CheckFailed with `message` unless `condition` holds."""
    if not condition:
        raise CheckFailed(message)


def say(message: str) -> None:
    """One line of progress."""
    print(f"compose: {message}", flush=True)


def compose(*arguments: str, check: bool = True) -> None:
    """Run one `docker compose` command, and pass its output on."""
    subprocess.run([*COMPOSE, *arguments], cwd=ROOT, env=ENVIRONMENT, check=check)


def build() -> None:
    """Build the image; show the output of the build only if it fails."""
    done = subprocess.run(
        [*COMPOSE, "--progress", "plain", "build"],
        cwd=ROOT,
        env=ENVIRONMENT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print(done.stdout, flush=True)
    expect(done.returncode == 0, "the image does not build (above)")


def read(*command: str) -> str:
    """Return the output of a command."""
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def address() -> str:
    """Where the service is published; only this machine may reach it."""
    published = read(*COMPOSE, "port", "api", "8000")
    expect(published.startswith("127.0.0.1:"), f"published on {published}, not on 127.0.0.1 alone")
    return f"http://{published}"


def train(service: httpx.Client, inputs: list[list[float]], classes: list[int]) -> str:
    """Upload a data set, train the adapter `check` from it through the queue, and return its digest."""
    header = [*(f"x{column}" for column in range(len(inputs[0]))), *(f"is_{label}" for label in range(10))]
    lines = [",".join(header)]
    for row, label in zip(inputs, classes, strict=True):
        lines.append(",".join(str(cell) for cell in [*row, *(int(k == label) for k in range(10))]))
    answer = service.put("/datasets/check", content="\n".join(lines), headers={"Content-Type": "text/csv"})
    expect(answer.status_code == 201, f"PUT /datasets/check answered {answer.status_code}: {answer.text}")
    answer = service.post(
        "/adapters",
        json={
            "name": "check",
            "rank": 4,
            "data": {"dataset": "check", "inputs": {"prefix": "x"}, "targets": {"prefix": "is_"}},
            "training": {"method": "closed_form", "ridge": 1.0},
        },
    )
    expect(answer.status_code == 202, f"POST /adapters answered {answer.status_code}: {answer.text}")
    job = answer.json()
    deadline = time.monotonic() + JOB_SECONDS
    while job["status"] in ("queued", "running"):
        expect(time.monotonic() < deadline, f"the job has not ended after {JOB_SECONDS} s: {job}")
        time.sleep(0.1)
        job = service.get(f"/jobs/{job['id']}").raise_for_status().json()
    expect(job["status"] == "succeeded", f"the job ended as {job['status']}: {job['error']}")
    digest: str = job["result"]["digest"]
    return digest


def predict(service: httpx.Client, adapter: str | None, inputs: list[list[float]]) -> dict[str, Any]:
    """One answer of POST /predict."""
    answer = service.post("/predict", json={"adapter": adapter, "inputs": inputs})
    expect(answer.status_code == 200, f"POST /predict answered {answer.status_code}: {answer.text}")
    body: dict[str, Any] = answer.json()
    return body


def check_confinement() -> None:
    """Both services run without root, capabilities or a writable root file system."""
    for service in SERVICES:
        seen = json.loads(read(*COMPOSE, "exec", "-T", service, "python", "-c", PROBE))
        uid = seen.pop("uid")
        expect(uid != 0, f"{service} runs as root")
        expect(seen == CONFINED, f"{service} is confined as {seen}, and should be as {CONFINED}")
        say(f"{service} runs as user {uid}, with no capabilities, on a read-only root file system")


def check_metrics(service: httpx.Client) -> None:
    """Check that one scrape shows both services, and what the trainer published."""
    deadline = time.monotonic() + METRICS_SECONDS
    wanted = {'loraplex_processes{role="trainer"} 1.0', 'loraplex_adapters_published_total{source="job"} 1.0'}
    while not wanted <= set(service.get("/metrics").raise_for_status().text.splitlines()):
        expect(time.monotonic() < deadline, f"/metrics does not show {wanted} after {METRICS_SECONDS} s")
        time.sleep(0.1)
    say("the api's /metrics counts what the trainer did")


def check_hosts(service: httpx.Client) -> None:
    """Check that the service accepts its name in the stack, and refuses another host name."""
    for host, status in (("api:8000", 200), ("evil.example", 403)):
        answer = service.get("/base", headers={"Host": host})
        expect(answer.status_code == status, f"GET /base of the host {host} answered {answer.status_code}")
    say("the api answers to its own hosts only")


def check_monitoring() -> None:
    """Prometheus and Grafana are there on request only, on this machine only, and write nowhere else."""
    asked = json.loads(read(*COMPOSE, "--profile", "obs", "config", "--format", "json"))["services"]
    by_default = set(read(*COMPOSE, "config", "--services").split())
    expect(by_default == set(SERVICES), f"'docker compose up' starts {by_default}")
    for name in sorted(set(asked) - set(SERVICES)):
        ports = asked[name]["ports"]
        expect(all(port["host_ip"] == "127.0.0.1" for port in ports), f"{name} is published as {ports}")
        expect(asked[name]["read_only"] and asked[name]["cap_drop"] == ["ALL"], f"{name} is not confined")
        say(f"{name} is there with --profile obs: {asked[name]['image']}")


def check_scale() -> None:
    """Check the file for several replicas, which does not work without its secrets. Its images are in registries."""
    for values, succeeds in (({}, False), (dict.fromkeys(SECRETS, "secret"), True)):
        # In another folder, because a person's deploy/.env stays out.
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, ".env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
            command = (*SCALE, "--project-directory", folder, "config", "--quiet")
            done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=False, capture_output=True, text=True)
        expect((done.returncode == 0) is succeeds, f"deploy/compose.scale.yml with {values}: {done.stderr}")
    say("deploy/compose.scale.yml is valid, and not without its secrets")


def check_extras() -> None:
    """Check that the image has what PostgreSQL and a bucket need."""
    compose("exec", "-T", "api", "python", "-c", "import obstore, psycopg; psycopg.pq.version()")
    say("the image has the extras")


def check_stop() -> None:
    """Both services end by themselves when asked to."""
    started = time.monotonic()
    compose("stop")
    for service in SERVICES:
        container = read(*COMPOSE, "ps", "--all", "--quiet", service)
        code = read("docker", "inspect", "--format", "{{.State.ExitCode}}", container)
        expect(code in ("0", "143"), f"{service} ended with exit code {code} (137: it was killed)")
    say(f"stopped in {time.monotonic() - started:.1f} s")


def check() -> None:
    """Run all checks, from the build on."""
    started = time.monotonic()
    say("building the image: a minute or two where nothing is cached")
    build()
    image = read(*COMPOSE, "config", "--images").split()[0]
    size = int(read("docker", "image", "inspect", "--format", "{{.Size}}", image))
    say(f"image built in {time.monotonic() - started:.0f} s, {size / 1e6:.0f} MB")

    with np.load(DIGITS, allow_pickle=False) as digits:
        inputs, classes = digits["images"][:ROWS].tolist(), digits["labels"][:ROWS].tolist()
    started = time.monotonic()
    compose("up", "--detach", "--wait")
    say(f"ready in {time.monotonic() - started:.0f} s")
    with httpx.Client(base_url=address(), timeout=30) as service:
        digest = train(service, inputs, classes)
        first = predict(service, "check", inputs[:5])
        expect(first["adapter"]["digest"] == digest, f"trained {digest}, answered with {first['adapter']}")
        expect(first["outputs"] != predict(service, None, inputs[:5])["outputs"], "the adapter changes nothing")
        check_metrics(service)
        check_hosts(service)
    say(f"trained and asked {digest[:19]}…")
    check_confinement()
    check_monitoring()
    check_extras()
    check_scale()

    check_stop()
    compose("down")
    compose("up", "--detach", "--wait")
    with httpx.Client(base_url=address(), timeout=30) as service:
        second = predict(service, "check", inputs[:5])
    expect(second == first, f"after down and up the answer is {second}, and was {first}")
    say("down and up again: the same digest, the same outputs")


def main() -> int:
    """0 where everything held. The stack and its volume are gone afterwards, also after a failure."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        compose("down", "--volumes", "--remove-orphans")
        check()
    except (CheckFailed, subprocess.CalledProcessError, httpx.HTTPError) as failure:
        say(f"FAILED: {failure}")
        subprocess.run([*COMPOSE, "ps", "--all"], cwd=ROOT, env=ENVIRONMENT, check=False)
        subprocess.run([*COMPOSE, "logs", "--tail", "200"], cwd=ROOT, env=ENVIRONMENT, check=False)
        return 1
    finally:
        subprocess.run([*COMPOSE, "down", "--volumes", "--remove-orphans"], cwd=ROOT, env=ENVIRONMENT, check=False)
    say("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
