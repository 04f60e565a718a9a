"""What loraplex costs, beside what one would otherwise use: `make bench` runs it and writes `RESULTS.md`."""
