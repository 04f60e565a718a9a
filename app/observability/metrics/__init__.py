"""What the service counts and measures, and how `/metrics` shows it. docs/metrics-reference.md lists every name.

Each process keeps its own figures in memory and writes them, once a second, to a file of its own; whichever worker is
asked adds all files up. `recording.Metrics` is the one door for those who count. Nothing is imported here: the
supervisor uses `process_slot`, and must not import torch.
"""
