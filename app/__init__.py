"""The service: FastAPI, the supervisor, the command line."""
