"""Helpers for the parts of a backend's five methods that are the same for every engine.

`packages` is for `probe`, `folders` for `compile`, `requirements` for `check`, `opening` for `load`, and `refusing` for
a `claim` that accepts a decoder as a whole or not at all. The helpers for sessions are in `transom.sessions`.
"""
