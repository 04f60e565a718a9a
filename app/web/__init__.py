"""The web pages: HTML rendered on the server, with scripts that call the public API.

Read `pages.rendering` first. Templates are in `templates`, style sheets and scripts in `static`.
"""
