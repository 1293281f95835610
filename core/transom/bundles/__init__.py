"""Compiled models as folders: the manifest, export, opening, proving, and the plan of an export."""
