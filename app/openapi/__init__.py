"""The OpenAPI document: FastAPI's, completed with headers, error codes and examples.

Read `document` first.
"""
