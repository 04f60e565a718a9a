"""Execution of queued trainings: the trainer, the child process that fits, and the publisher of the results.

Read `trainer.py` first. `fit_client.py` and `fit_child.py` are the two ends of the pipe to the child process.
"""
