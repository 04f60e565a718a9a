"""Evaluation of factors on held-out rows, and the decisions that depend on it.

Start with `evaluate`. `metrics` has the formulas, `gate` decides whether a new version becomes live, and `selection`
chooses rank, ridge and learning rate.
"""
