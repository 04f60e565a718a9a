"""Closed form: the best adapter of a rank under squared error, from sufficient statistics of the rows.

Start with `solver`, which gives the formula, then `statistics`. `ridge_search` chooses ridge and rank. `refit` adds and
removes rows without the other rows.
"""
