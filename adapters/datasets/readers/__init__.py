"""Readers of uploaded data sets, one module for each format: CSV, JSON lines, Arrow and Parquet, NPZ.

Each has a function that takes a path and returns a `Source`: the planned columns, and an iterator over chunks of rows.
"""
