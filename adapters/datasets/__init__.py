"""Data sets: tables that are uploaded once, stored under a name and a version, and trained on by reference.

Start with `ingest`: a child process reads the uploaded file with one of the `readers`, checks it (`validation`) and
writes the stored form, an Arrow file (`arrow_file`). `store` keeps the versions, and training reads them with `table`.
"""
