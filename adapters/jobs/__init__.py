"""The durable queue of training jobs.

`queue` has the transactions, `job` the values of a job, `job_adapters` the values and statements of the adapters that
it trains, and `training_job` its payload. Read `queue` first.
"""
