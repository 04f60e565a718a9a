"""Candidates of `method: auto`: what is tried, how leave-one-out chooses, and the folds that evaluate the choice.

Start with `auto_fit`, the two entry points. `scores` has the losses, `leave_out` the algebra of left-out rows, `fleet_mean`
what groups have in common, `small` the fit of stacks of groups with few rows, and `large` that of one with many.
"""
