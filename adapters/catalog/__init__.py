"""The published adapters: names, versions, aliases, and the cache of adapters in memory.

`catalog` has the transactions, `queries` their statements, and `versions` the values. `resolver` turns references into
versions for every batch, `adapter_cache` holds the adapters on the device, and `counts` counts rows for metrics. Read
`catalog` first.
"""
