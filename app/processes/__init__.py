"""The processes of the service: a supervisor, API workers and trainers, and the guard of the data folder.

Read `supervisor` first. `adapters.child_process`, which starts a process, belongs to the domain, because the domain
starts processes of its own.
"""
