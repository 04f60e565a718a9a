"""The page for people: HTML written on the server from what the JSON calls answer with, one file a view.

Reading is done here; what changes something goes from the browser through the public JSON calls.
"""
