"""Planning of a training: from a parsed request to a checked `TrainingJob` with its data and its estimated cost.

Read `planner.py` first. `request.py` has the values that the delivery layer passes in, and `auto.py` decides what a
request leaves open.
"""
