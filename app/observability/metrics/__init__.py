"""Metrics of the service: their definitions, their values in each process, and the answer of `/metrics`.

Each process keeps its own values in memory and writes them to a file of its own once a second; the worker that is
scraped adds up all files. Read `definitions` first, then `recorder`. docs/metrics-reference.md lists every metric.
Nothing is imported here: the supervisor uses `process_slot`, and must not import torch.
"""
