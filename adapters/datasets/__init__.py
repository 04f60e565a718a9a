"""Data sets: tables that are uploaded once, kept under a name and a number, and trained on by reference.

A child process reads the uploaded file (`read_process`, `convert`, a `formats_*` for each family of formats) and writes
one internal form, an Arrow file; `store` keeps it, and `table` is what training reads.
"""
