"""Observability: metrics, the request log, process logs and traces.

Read `observer` first: it receives a record of every request and batch. `records` defines the records.
"""
