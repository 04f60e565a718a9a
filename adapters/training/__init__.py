"""Training of adapters: settings, planning, gradient descent, closed form, evaluation and execution.

Read `planning/planner.py` for the way from a request to a `TrainingJob`, `fit.py` for one training from its rows to its
metrics, and `execution/trainer.py` for the process that claims jobs.
"""
