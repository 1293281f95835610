"""Compiled models as folders: manifest, export, loading, verification, and the plan of an export."""
