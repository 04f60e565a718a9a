"""Estimate of a training before it is queued: memory of the fit process, and time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapters.errors import EstimateTooLarge
from adapters.training.limits import CHUNK_ROWS, MAX_CACHED_OUTPUTS, MAX_STACK_GROUPS, STACK_NUMBERS, SUM_CHUNK_NUMBERS
from adapters.training.planning.split import FEW_ROWS, FOLDS
from adapters.training.settings import Candidate, Loss, TrainingSpec

# Memory of torch, a base layer of a few MiB, and small fits.
PROCESS_BYTES = 320 * 2**20
# Memory for each row and each group of a fleet whose rows are sorted on disk: places, keys, errors and choices.
_ROW_BYTES, _GROUP_BYTES = 200, 16 * 2**10
_FLOPS_A_SECOND = 5e9
_SCRATCH_BYTES_A_SECOND = 2e8
# Cost of the smallest step.
_SECONDS_A_STEP = 2e-4
_RETRIEVAL_TILE = 2**21
# What the candidates are tried with together, and the small groups of a stack.
_SETTINGS_TRIED = 500
_CANDIDATE_GROUPS = 64


@dataclass(frozen=True, slots=True)
class Estimate:
    """Rough estimate, too high rather than too low."""

    memory_bytes: int
    seconds: float
    scratch_bytes: int = 0
    """Disk space for the rows of a fleet that do not fit in memory; 0 if they do."""

    def check(self, limit: int) -> "Estimate":
        """Return the estimate; raise `EstimateTooLarge` if it needs more memory than a trainer may use."""
        if self.memory_bytes > limit:
            given, expected = self.memory_bytes, f"at most {limit} bytes (LORAPLEX_TRAINER_MEMORY_BYTES)"
            detail = f"the job is estimated to need {given} bytes of memory; a trainer may use {expected}"
            raise EstimateTooLarge(detail, field="data", given=given, expected=expected)
        return self


def estimate(
    spec: TrainingSpec,
    *,
    in_features: int,
    out_features: int,
    training_rows: int,
    held_rows: int = 0,
    group_sizes: Sequence[int] | None = None,
) -> Estimate:
    """Estimate the training of one adapter, or of a fleet; the data are read from disk and do not count.

    group_sizes: rows of each group of a fleet.
    """
    I, O, R = in_features, out_features, spec.rank
    base_bytes = 4 * I * O * 3  # float32, and float64 while it is evaluated
    if spec.candidates:
        rows = training_rows + held_rows
        return _of_candidates(spec, I, O, rows, [rows] if group_sizes is None else group_sizes, base_bytes)
    if group_sizes is not None:
        return _of_fleet(spec, I, O, training_rows, group_sizes, base_bytes)
    # Rows that are read, those before them, and both again in float64.
    measured = min(CHUNK_ROWS, max(training_rows, held_rows)) * (16 * I + 32 * O)
    held = held_rows * (4 * I + 8 * O * 4)
    if spec.loss is Loss.MULTIPLE_NEGATIVES:
        held += 8 * _RETRIEVAL_TILE * 4
    trials = 1 + len(spec.try_ranks) + len(spec.try_rates)
    if spec.is_exact:
        J = I + 1
        needed = (
            8 * J * J * 10 + 8 * J * O * 8 + 8 * O * O * 3 + 8 * min(training_rows * (I + O), SUM_CHUNK_NUMBERS) * 5
        )
        operations = 2.0 * training_rows * J * (J + 2 * O) + 25.0 * I**3 + 8.0 * I * O * min(I, O)
        if spec.try_ridges or spec.try_ranks:
            operations += 20 * (4.0 * I * O * min(I, O) + 2.0 * I * I * O)
        seconds = operations / _FLOPS_A_SECOND
    else:
        batch, numbers = spec.batch(training_rows), O * R + R * I + O
        frozen = 4 * training_rows * O if training_rows * O <= MAX_CACHED_OUTPUTS else 0
        needed = frozen + 4 * batch * (I + 6 * O + 2 * R) + 4 * numbers * 6
        if batch == training_rows and held_rows:
            needed += 4 * training_rows * (I + O)
        if spec.loss is Loss.MULTIPLE_NEGATIVES:
            needed += 4 * batch * batch * 6 + 8 * training_rows * O * 2
        a_row = 6.0 * R * (I + O) + (0 if frozen else 2.0 * I * O)
        a_step = _SECONDS_A_STEP + batch * a_row / _FLOPS_A_SECOND
        seconds = spec.steps(training_rows) * a_step + (trials - 1) * min(200, spec.steps(training_rows)) * a_step
    seconds += (training_rows + held_rows) * 4.0 * I * O / _FLOPS_A_SECOND
    return Estimate(int(PROCESS_BYTES + base_bytes + needed + measured + held), seconds)


def estimate_fleet(
    spec: TrainingSpec, *, in_features: int, out_features: int, held_rows: int, group_sizes: Sequence[int], limit: int
) -> Estimate:
    """Estimate a fleet for a trainer with so much memory.

    If its rows or what is computed from them would exceed the memory, they are on disk, in the order of the groups.
    """
    I, O, rows = in_features, out_features, sum(group_sizes)
    shape = {"in_features": I, "out_features": O, "training_rows": rows - held_rows, "held_rows": held_rows}
    in_memory = estimate(spec, **shape, group_sizes=group_sizes)
    # Rows with their weight, key and group.
    table = rows * (4 * I + 4 * max(O, 2) + 20)
    if max(in_memory.memory_bytes, table) <= limit:
        return in_memory
    seconds = in_memory.seconds + 4 * table / _SCRATCH_BYTES_A_SECOND
    if not spec.candidates:
        return Estimate(in_memory.memory_bytes + 16 * rows, seconds, table)
    kept, groups = _kept_of_candidates(I, O, group_sizes), len(group_sizes)
    # Rows of all groups are read in chunks, whatever the size of a group.
    read = 8 * 5 * min(rows, CHUNK_ROWS) * (I + 2 * O)
    memory = in_memory.memory_bytes - kept + read + rows * _ROW_BYTES + groups * _GROUP_BYTES
    # All adapters are chosen before the first is published.
    return Estimate(memory, seconds, table + kept + groups * 4 * (spec.rank * (I + O) + O))


def estimate_evaluation(
    spec: TrainingSpec, *, in_features: int, out_features: int, rows: int, adapters: int
) -> Estimate:
    """Estimate the evaluation of `adapters` versions, one after the other, on the same rows."""
    I, O, C = in_features, out_features, spec.classes or out_features
    # In float64: the outputs, those of the classes while they are matched, and the targets.
    of_a_row = 16 * O + 24 * C + 64
    chunk = min(CHUNK_ROWS, rows) * (16 * I + 32 * O)
    seconds = adapters * rows * 4.0 * I * O / _FLOPS_A_SECOND
    return Estimate(PROCESS_BYTES + 12 * I * O + rows * of_a_row + chunk, seconds)


def _of_candidates(
    spec: TrainingSpec, I: int, O: int, rows: int, group_sizes: Sequence[int], base_bytes: int
) -> Estimate:
    J, sizes = I + 1, np.minimum(group_sizes, 2**31)
    kept = _kept_of_candidates(I, O, group_sizes)
    read = 8 * 5 * min(int(sizes.max()) * (I + 2 * O), SUM_CHUNK_NUMBERS)
    # Kernels of a stack for each fold, or sums of one large group.
    widest = min(int(sizes.max()), J)
    together = min(_CANDIDATE_GROUPS, len(sizes)) if widest < J else 1
    decomposed = 8 * together * widest * (widest + O) * 2 * FOLDS + 8 * J * (J + O) * 10
    operations = 2.0 * float((np.minimum(sizes, J).astype(float) ** 2 * (sizes + 25 * np.minimum(sizes, J))).sum())
    seconds = 2 * (FOLDS + 1) * operations / _FLOPS_A_SECOND + 4e-9 * _SETTINGS_TRIED * (FOLDS + 1) * rows * (I + O)
    if Candidate.ADAMW in spec.candidates:
        a_step = _SECONDS_A_STEP + min(rows, spec.batch_size or rows) * 6.0 * spec.rank * (I + O) / _FLOPS_A_SECOND
        large = int((sizes >= FEW_ROWS).sum())
        seconds += large * (1 + len(spec.try_rates)) * spec.steps(max(1, rows // len(sizes))) * a_step
        read += 4 * MAX_CACHED_OUTPUTS if rows * O > MAX_CACHED_OUTPUTS else 4 * rows * O
    return Estimate(int(PROCESS_BYTES + base_bytes + kept + read + decomposed), seconds)


def _kept_of_candidates(I: int, O: int, group_sizes: Sequence[int]) -> int:
    """Return the bytes of the small groups' rows, with an error for each setting; other rows are read in chunks."""
    sizes = np.asarray(group_sizes)
    return int(sizes[sizes < FEW_ROWS].sum()) * (12 * I + 40 * O + 4 * _SETTINGS_TRIED)


def _of_fleet(spec: TrainingSpec, I: int, O: int, rows: int, group_sizes: Sequence[int], base_bytes: int) -> Estimate:
    groups, largest = len(group_sizes), max(group_sizes)
    R, J, together = spec.rank, I + 1, min(MAX_STACK_GROUPS, groups)
    # The rows of a stack: read, padded, and in float64 while they are evaluated.
    in_a_stack = max(largest * (I + 2 * O), min(rows * (I + 2 * O), STACK_NUMBERS))
    needed = 36 * in_a_stack + 8 * 4 * rows
    if spec.is_exact:
        of_a_group = J * (J + O)
        needed += 48 * in_a_stack + 64 * min(together * of_a_group, max(of_a_group, 2 * STACK_NUMBERS))
        seconds = groups * (25.0 * I**3 + 8.0 * I * O * min(I, O)) / _FLOPS_A_SECOND
    else:
        of_a_group = R * (I + O) + O
        needed += 24 * min(together * of_a_group, max(of_a_group, STACK_NUMBERS // 4))
        if spec.loss is Loss.MULTIPLE_NEGATIVES:
            most = spec.batch(largest)
            needed += 32 * most**2 * min(together, max(1, in_a_stack // (most * (I + 2 * O))))
        middle = max(1, rows // groups)
        steps = spec.steps(middle)
        seconds = groups * steps * (2e-6 + spec.batch(middle) * 6.0 * R * (I + O) / _FLOPS_A_SECOND)
    seconds += groups * 2e-4 + rows * 8.0 * I * O / _FLOPS_A_SECOND
    return Estimate(int(PROCESS_BYTES + base_bytes + needed), seconds)
