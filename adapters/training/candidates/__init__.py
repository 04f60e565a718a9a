"""Candidates of `method: auto`: what is tried, how leave-one-out chooses, and the folds that evaluate the choice.

Start with `auto_fit`, which has the two entry points. `task` has what all adapters of a fit share, `scores` the losses,
`features` the kinds of ridge, `leave_out` the algebra of left-out rows, and `fleet_mean` what groups have in common.
`small` chooses for stacks of groups with few rows, `large` for one adapter with many, and `descent` is AdamW. `outcome`
collects what a job says.
"""
