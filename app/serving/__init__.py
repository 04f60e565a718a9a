"""Serving: predict and infer requests from their bytes to their answers.

Read `queue_entry` first, then `batcher` and `adapter_loader`. `request` and `response` are the bodies of
`POST /predict`, `asgi` its handler, and `oip` the Open Inference Protocol. `fast_path` answers small plain requests
without ASGI; `uvicorn_protocol`, `connection_guard`, `connections` and `buffered_transport` are the connections.
"""
