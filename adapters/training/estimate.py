"""What a training will take, before it is queued: memory of the process that fits, and time."""

from dataclasses import dataclass

from adapters.training.spec import Loss, TrainingSpec

_PROCESS_BYTES = 320 * 2**20
"""torch, a base layer of a few MiB, and what small fits need."""
_FLOPS_A_SECOND = 1e10
_SECONDS_A_STEP = 1e-4
"""What a step costs however small it is."""
_FROZEN_AT_ONCE = 2**26
_MEASURED_AT_ONCE = 8192
_STACK_NUMBERS = 2**20
_RETRIEVAL_TILE = 2**21


@dataclass(frozen=True, slots=True)
class Estimate:
    """Rough, and rather too much than too little."""

    memory_bytes: int
    seconds: float


def estimate(
    spec: TrainingSpec,
    *,
    in_features: int,
    out_features: int,
    training_rows: int,
    held_rows: int = 0,
    groups: int | None = None,
    largest_group: int = 0,
) -> Estimate:
    """Of one adapter, or of a fleet of `groups`. The data themselves are read from the disk, and are not counted."""
    I, O, R = in_features, out_features, spec.rank
    base_bytes = 4 * I * O * 3  # as it is held, and in float64 while it is measured
    if groups is not None:
        return _of_fleet(spec, I, O, training_rows, groups, largest_group, base_bytes)
    measured = min(_MEASURED_AT_ONCE, max(training_rows, held_rows)) * (8 * I + 32 * O)
    held = held_rows * (4 * I + 8 * O * 4)
    if spec.loss is Loss.MULTIPLE_NEGATIVES:
        held += 8 * _RETRIEVAL_TILE * 4
    trials = 1 + len(spec.try_ranks) + len(spec.try_rates)
    if spec.is_exact:
        J = I + 1
        needed = 8 * J * J * 10 + 8 * J * O * 8 + 8 * O * O * 3
        operations = 2.0 * training_rows * J * (J + 2 * O) + 25.0 * I**3 + 8.0 * I * O * min(I, O)
        if spec.try_ridges or spec.try_ranks:
            operations += 20 * (4.0 * I * O * min(I, O) + 2.0 * I * I * O)
        seconds = operations / _FLOPS_A_SECOND
    else:
        batch, numbers = spec.batch(training_rows), O * R + R * I + O
        frozen = 4 * training_rows * O if training_rows * O <= _FROZEN_AT_ONCE else 0
        needed = frozen + 4 * batch * (I + 6 * O + 2 * R) + 4 * numbers * 6
        if batch == training_rows and held_rows:
            needed += 4 * training_rows * (I + O)
        if spec.loss is Loss.MULTIPLE_NEGATIVES:
            needed += 4 * batch * batch * 6 + 8 * training_rows * O * 2
        a_row = 6.0 * R * (I + O) + (0 if frozen else 2.0 * I * O)
        a_step = _SECONDS_A_STEP + batch * a_row / _FLOPS_A_SECOND
        seconds = spec.steps(training_rows) * a_step + (trials - 1) * min(200, spec.steps(training_rows)) * a_step
    seconds += (training_rows + held_rows) * 4.0 * I * O / _FLOPS_A_SECOND
    return Estimate(int(_PROCESS_BYTES + base_bytes + needed + measured + held), seconds)


def _of_fleet(spec: TrainingSpec, I: int, O: int, rows: int, groups: int, largest: int, base_bytes: int) -> Estimate:
    in_a_stack = max(largest * I, _STACK_NUMBERS)
    R, J = spec.rank, I + 1
    stacked = max(1, min(256, _STACK_NUMBERS // max(1, largest * I)))
    needed = in_a_stack * (4 + 8) * 2 + in_a_stack // I * O * 8 * 8 + 8 * 4 * rows
    if spec.is_exact:
        needed += stacked * 8 * (J * J * 8 + J * O * 8)
        seconds = groups * (25.0 * I**3 + 8.0 * I * O * min(I, O)) / _FLOPS_A_SECOND
    else:
        needed += stacked * 4 * (O * R + R * I + O) * 6
        steps = spec.steps(max(1, rows // groups))
        seconds = groups * steps * (2e-6 + spec.batch(max(1, rows // groups)) * 6.0 * R * (I + O) / _FLOPS_A_SECOND)
    seconds += groups * 2e-4 + rows * 8.0 * I * O / _FLOPS_A_SECOND
    return Estimate(int(_PROCESS_BYTES + base_bytes + needed), seconds)
