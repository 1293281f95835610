"""Helpers for the five methods of a backend, where what a method owes is the same for every engine.

`folders` is for `compile`, `requirements` for `check`, `opening` for `load`, and `refusing` for a `claim` that takes a
decoder whole or not at all. Sessions have helpers of their own, in `transom.sessions`.
"""
