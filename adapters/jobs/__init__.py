"""The durable queue of training jobs.

`queue` has the transactions, and `job` and `job_adapters` the values and statements of their tables. `training_job` is
the payload of a job. Read `queue` first.
"""
