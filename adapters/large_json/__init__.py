"""Reader of large JSON bodies in a child process, so that the service neither stalls nor grows.

Start with `reader`, which starts the process and is its program. `parser` is the parser that converts tables to arrays
while it reads.
"""
