"""What people read to judge an adapter: metrics of outputs on held-out rows. docs/metrics.md has every formula.

The front is here; each kind of task has a module.
"""

from adapters.training.evaluation.metrics.tasks import (
    HIGHER_IS_BETTER,
    PRIMARY,
    Task,
    measure,
    measure_trivial,
    scalars,
)
from adapters.training.evaluation.metrics.values import Metrics

__all__ = ["HIGHER_IS_BETTER", "PRIMARY", "Metrics", "Task", "measure", "measure_trivial", "scalars"]
