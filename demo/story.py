"""Steps of the demo: one base layer, two tenants whose scanners change the images, an adapter for each, and a crash."""

# N rows · I in_features
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from demo import calls
from demo.digits import SOURCE, Digits, draw, fade, load_digits, rotate_and_invert
from demo.problems import DemoFailed, check
from demo.screen import Screen
from demo.service import Service
from demo.tenant import train_elsewhere

ACME, BIRCH = "acme", "birch"
ACME_RANK, BIRCH_RANK = 4, 1
ACME_TRAINING: dict[str, object] = {
    "method": "adamw",
    "loss": "cross_entropy",
    "epochs": 300,
    "batch_size": 64,
    "learning_rate": 0.003,
    "seed": 0,
}
POLL_SECONDS = 0.2
INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended, by the convention of shells."""


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """The held-out digits, plain and as each tenant's scanner delivers them."""

    plain: Digits
    acme: Digits
    birch: Digits


def main() -> int:
    """Run the demo and return the exit code."""
    screen = Screen()
    started = time.monotonic()
    # SIGTERM and a closed terminal end the demo like Ctrl-C, so that the service is stopped and its folder removed.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="loraplex-demo-") as folder:
            _run_and_clean_up(screen, Path(folder))
    except DemoFailed:
        return 1
    except KeyboardInterrupt:
        screen.say("Interrupted; the service has been ended and its folder removed.")
        return INTERRUPTED
    screen.say(f"The demo took {time.monotonic() - started:.0f} s.")
    return 0


def _run_and_clean_up(screen: Screen, folder: Path) -> None:
    service = Service(folder)
    try:
        with httpx.Client(base_url=service.url, trust_env=False, timeout=60) as client:
            _run(screen, service, client, folder)
    except (DemoFailed, httpx.HTTPError) as error:
        message = str(error) if isinstance(error, DemoFailed) else f"The service did not answer: {error!r}"
        screen.fail(message, service.log_tail())
        raise DemoFailed from error
    finally:
        # From here on signals are ignored: an interrupted clean-up would leave the service running.
        for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(ending, signal.SIG_IGN)
        service.kill()


def _run(screen: Screen, service: Service, client: httpx.Client, folder: Path) -> None:
    training, held_out = load_digits()
    views = Views(held_out, held_out.seen_by(rotate_and_invert), held_out.seen_by(fade))
    _start(screen, service)
    _the_base_alone(screen, client, views)
    _acme_trains(screen, client, training.seen_by(rotate_and_invert), views.acme)
    _birch_uploads(screen, client, training.seen_by(fade), views.birch, folder / BIRCH)
    _all_in_one_request(screen, client, views)
    _crash_and_return(screen, service, client, views)
    with screen.waiting("Ending the service"):
        service.end()
    screen.say("The service has stopped, and its data folder is removed.")


def _start(screen: Screen, service: Service) -> None:
    screen.chapter("1. A service starts")
    service.start()
    with screen.waiting("Waiting for loraplex serve, which loads torch first"):
        seconds = service.wait_until_ready()
    screen.say(f"After {seconds:.1f} s it is ready at {service.url}, with the bundled layer, 64 → 10.")


def _the_base_alone(screen: Screen, client: httpx.Client, views: Views) -> None:
    screen.chapter("2. The base layer alone, on plain digits and on those of two scanners")
    plain, acme, birch = (
        view.share_right(calls.predict(client, None, view.images).classes)
        for view in (views.plain, views.acme, views.birch)
    )
    screen.say(f"The data: {SOURCE}.")
    unseen = len(views.plain.labels)
    screen.say(f"The base layer is right on {plain:.1%} of {unseen} digits that it was not trained on.")
    screen.say(f"The scanner of {ACME} rotates them by 90° and inverts them: {acme:.1%} right.")
    screen.say(f"The scanner of {BIRCH} gives half the contrast on a grey page: {birch:.1%} right.")
    check(plain > 0.93, "the base layer is right on more than 93 % of the digits")
    check(acme < 0.20, f"the base layer fails on the digits of {ACME}, with less than 20 % right")
    check(birch < 0.55, f"the base layer fails on the digits of {BIRCH}, with less than 55 % right")


def _acme_trains(screen: Screen, client: httpx.Client, training: Digits, held_out: Digits) -> None:
    screen.chapter(f"3. The service trains an adapter for {ACME}")
    job = calls.start_training(client, ACME, rank=ACME_RANK, digits=training, training=ACME_TRAINING)
    screen.say(f"POST /adapters with {len(training.labels)} of its digits returns a job:")
    with screen.training_progress() as show:
        job = calls.follow_job(client, job, wait=lambda: time.sleep(POLL_SECONDS), show=show)
    right = held_out.share_right(calls.predict(client, ACME, held_out.images).classes)
    numbers, copy = _numbers_of(ACME_RANK), 10 * 64 + 10
    screen.say(f"{ACME}@{job['result']['version']} is live: {right:.1%} right on held-out digits of {ACME}.")
    screen.say(f"It is an adapter of rank {ACME_RANK}, {numbers} numbers; a copy of the layer has {copy}.")
    check(right > 0.80, f"the adapter of {ACME} is right on more than 80 %")


def _birch_uploads(screen: Screen, client: httpx.Client, training: Digits, held_out: Digits, folder: Path) -> None:
    screen.chapter(f"4. {BIRCH} trains an adapter itself, and uploads it")
    with screen.waiting(f"{BIRCH} runs its own torch script"):
        train_elsewhere(training, folder, rank=BIRCH_RANK)
    version = calls.upload_peft_files(client, BIRCH, folder)
    right = held_out.share_right(calls.predict(client, BIRCH, held_out.images).classes)
    screen.say(f"PUT /adapters/{BIRCH} makes version {version['version']} of its two PEFT files.")
    screen.say(f"Rank {BIRCH_RANK}, {_numbers_of(BIRCH_RANK)} numbers: {right:.1%} right on held-out digits.")
    check(right > 0.90, f"the adapter of {BIRCH} is right on more than 90 %")


def _all_in_one_request(screen: Screen, client: httpx.Client, views: Views) -> None:
    screen.chapter("5. Both adapters and the base layer in one request")
    adapters = (None, ACME, BIRCH)
    all_views = (views.plain, views.acme, views.birch)
    alone = [calls.predict(client, adapter, view.images) for adapter, view in zip(adapters, all_views, strict=True)]
    # Show a digit for which each adapter is right on its own tenant's image, and the base layer on the plain one only.
    shows_N = np.all([answer.classes == views.plain.labels for answer in alone], axis=0)
    for view in (views.acme, views.birch):
        shows_N &= calls.predict(client, None, view.images).classes != view.labels
    row = int(shows_N.argmax())
    images_NI = np.stack([view.images[row] for view in all_views])
    nine = calls.predict_rows(client, adapters * 3, images_NI.repeat(3, axis=0))

    digit = views.plain.labels[row]
    answers = nine.classes.reshape(3, 3)
    rows = [
        [scanner, draw(image_I), *(f"{answer} ✓" if answer == digit else f"{answer}" for answer in line)]
        for scanner, image_I, line in zip(("as trained", ACME, BIRCH), images_NI, answers, strict=True)
    ]
    screen.say(f"One {digit} from three scanners, each image with three adapters: nine rows in one POST /predict.")
    screen.table(("scanner", "image", "base layer", ACME, BIRCH), rows)
    own = np.stack([answer.outputs[row] for answer in alone])
    same = np.allclose(nine.outputs[[0, 4, 8]], own, rtol=1e-4, atol=1e-4)
    check(same, "a row has the same outputs whatever other rows are in its request")


def _crash_and_return(screen: Screen, service: Service, client: httpx.Client, views: Views) -> None:
    screen.chapter("6. kill -9")
    asked = ((ACME, views.acme.images), (BIRCH, views.birch.images))
    before = [calls.predict(client, adapter, images_NI) for adapter, images_NI in asked]
    processes = service.kill()
    screen.say(f"All {processes} processes of the service were killed.")
    service.start()
    with screen.waiting("Starting it again with the same data folder"):
        seconds = service.wait_until_ready()
    after = [calls.predict(client, adapter, images_NI) for adapter, images_NI in asked]
    for one, other in zip(before, after, strict=True):
        check(one.digests == other.digests, "the same adapter answers after the crash")
        check(np.array_equal(one.outputs, other.outputs), "its outputs are the same after the crash")
    screen.say(f"It is back after {seconds:.1f} s. The same digests give the same outputs, to the last bit:")
    for (adapter, _), answer in zip(asked, after, strict=True):
        screen.say(f"{adapter:6} {answer.digests[0]}")


def _numbers_of(rank: int) -> int:
    return rank * (64 + 10)
