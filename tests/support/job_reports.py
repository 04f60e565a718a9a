"""Reports of a job in the form in which the API shows them."""

from typing import Any

EVALUATION: dict[str, Any] = {
    "by": "cross_validation",
    "rows": 40,
    "metric": "accuracy",
    "adapter": 0.85,
    "base": 0.425,
    "live": None,
    "guess": 0.1,
    "intervals": {"adapter": [0.7093, 0.9294], "base": [0.2851, 0.578]},
    "gain": 0.425,
    "gain_error": 0.0812,
}
DECISION: dict[str, Any] = {"moved": True, "reason": "it is better", "outcome": "better", "gain": 0.425}
AUTO: dict[str, Any] = {
    "metric": "log_loss",
    "rows": 40,
    "by": "leave_one_out",
    "taken": "ridge",
    "reason": "the lowest of all",
    "candidates": [
        {"candidate": "base", "figure": 1.9, "settings": {}, "skipped": None},
        {"candidate": "ridge", "figure": 0.5222, "settings": {"ridge": 3.0, "rank": 4, "bias": True}, "skipped": None},
        {"candidate": "own_head", "figure": None, "settings": {}, "skipped": "rank 64 is above 8"},
    ],
}
