"""Evaluation of factors on held-out rows, and the decisions that depend on it.

Start with `evaluate`. `metrics` has the formulas, `label_matching` compares versions with different labels, `gate`
decides whether a new version becomes live, and `selection` chooses rank, ridge and learning rate.
"""
