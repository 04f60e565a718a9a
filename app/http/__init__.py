"""The HTTP layer: the FastAPI application, its endpoints, middleware, request bodies and errors.

It translates between HTTP and the domain, which makes the decisions. Handlers are in `routes`, and pydantic models of
bodies in `schemas`. Read `endpoints` first: the table of all calls. Then read `application` and `middleware`.
"""
