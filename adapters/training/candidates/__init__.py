"""Candidates of `method: auto`: what is tried, how leave-one-out chooses, and the folds that evaluate the choice.

Start with `auto_fit`, which has the two entry points. `task` has what all adapters of a fit share, `scores` the losses,
`features` the kinds of ridge, `leave_out` the algebra of left-out rows, and `fleet_mean` what groups have in common.
`small` compares candidates for stacks of groups with few rows, `choice` takes one for each group, and `composed` makes
it an adapter; `large` does so for one adapter with many rows, and `descent` is AdamW. `outliers` finds the groups that
are fitted alone, `suspects` the rows with doubtful labels, and `fit_result` collects what a job says.
"""
