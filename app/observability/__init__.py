"""Observability: metrics, the request log, process logs, traces and usage.

Read `observer` first: it receives a record of every request and batch. `records` defines the records.
"""
