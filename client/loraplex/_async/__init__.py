"""The asynchronous client, of which `scripts/generate_client.py` makes `loraplex._sync`, the blocking one.

The modules here have what waits: requests, pauses and files. What waits for nothing is in `loraplex`, once for both.
Read `client` first.
"""
