"""Making the operators that plugins bring known to the registry, before a graph that uses them is read."""

from __future__ import annotations

from transom.ops import find, register
from transom.plugins import PluginFailure, Plugins


def register_operators(plugins: Plugins) -> None:
    """Register what the `transom_ops` hooks return. One that breaks a rule is recorded as a failure and left out."""
    for schema in plugins.operators():
        if find(schema.domain, schema.name) is schema:
            continue
        try:
            register(schema)
        except ValueError as error:
            name = f"{schema.domain}::{schema.name}"
            failure = PluginFailure(name, schema.domain, "ops", str(error), "Update or remove the plugin it is from")
            if failure not in plugins.failures:
                plugins.failures.append(failure)
