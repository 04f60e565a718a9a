"""What the service counts and measures, and how `/metrics` shows it. docs/metrics-reference.md lists every name.

Each process keeps its own figures in memory and writes them, once a second, to a file of its own; whichever worker is
asked adds all files up. `Metrics` is the one door for those who count.
"""

from app.observability.metrics.recording import Metrics

__all__ = ["Metrics"]
