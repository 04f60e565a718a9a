"""Handlers of the calls, one module for each resource; `app.http.endpoints` assigns them to paths."""
