"""Pydantic models of request and response bodies. Arrays are `Any` here, and are checked by `adapters.arrays`."""
