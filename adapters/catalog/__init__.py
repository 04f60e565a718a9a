"""The published adapters: names, versions, aliases, and the cache of adapters in memory.

`catalog` has the transactions, and the resolver that turns references into versions for every batch. `queries` has
their statements, and `versions` the values. `adapter_cache` holds the adapters on the device, and `counts` counts rows
for metrics. Read `catalog` first.
"""
