"""The durable queue of training jobs.

`queue` has the transactions, `job` and `job_adapters` the values and statements of their tables, and `revert` takes
back what a job published. Read `queue` first.
"""
