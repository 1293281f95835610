"""`transom cache`: list, verify, prune and clear the artifact cache."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import click

from transom.cli.options import JSON
from transom.cli.output import print_json, table, wrapped


@click.group(
    epilog="""\b
Examples:
  transom cache list
  transom cache prune --size 5GB
  transom cache prune --unused-days 30
  transom cache verify
  transom cache clear
"""
)
def cache() -> None:
    """List, verify, prune or clear the compiled models (in TRANSOM_CACHE, or the user's cache folder)."""


@cache.command("list")
@JSON
def show(as_json: bool) -> None:
    """List every entry, least recently used first."""
    from transom.artifacts import Cache
    from transom.preparation.memory import size

    store = Cache.default()
    items, stats = store.list(), store.stats()
    if as_json:
        print_json({"root": str(store.root), "entries": items, "stats": stats})
        return
    rows = [
        (
            i.kind,
            i.key[:12],
            i.problem or _what(i.facts),
            size(i.bytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(i.last_used)) + (", in use" if i.in_use else ""),
        )
        for i in items
    ]
    table(("kind", "key", "content", "size", "last used"), rows, right=(3,))
    limit = "no limit" if store.limit is None else f"limit {size(store.limit)}"
    click.echo("\n" + wrapped(f"{size(stats.bytes)} in {len(items)} entries under {store.root} ({limit})", sys.stdout))


@cache.command()
@click.option("--size", "limit", help="Maximum size, such as 5GB. [default: TRANSOM_CACHE_SIZE or 20GB]")
@click.option("--unused-days", type=float, help="Also remove entries not used for this many days; 0 or more.")
@JSON
def prune(limit: str | None, unused_days: float | None, as_json: bool) -> None:
    """Remove left-overs and the least recently used entries until the cache fits its limit."""
    from transom.artifacts import Cache, parse_size
    from transom.errors import OptionError

    if unused_days is not None and not unused_days >= 0:  # also refuses NaN
        raise OptionError(
            f"--unused-days {unused_days:g} is not a number of days: every entry would be removed, or none",
            "Give 0 or more; transom cache clear removes everything",
        )
    since = None if unused_days is None else time.time() - unused_days * 86400
    removed = Cache.default().prune(limit=parse_size(limit, "--size") if limit else None, unused_since=since)
    _tell(removed, as_json)


@cache.command("verify")
@JSON
def verify_content(as_json: bool) -> None:
    """Compare the content of every entry with its hashes, and remove what has changed."""
    from transom.artifacts import Cache
    from transom.preparation.memory import size

    found = Cache.default().verify()
    if as_json:
        print_json(found)
    else:
        click.echo(f"{found.entries} entries are intact, {size(found.bytes)}")
        for name in found.corrupt:
            click.echo(f"{name} had changed and is removed; the next load makes it again")
    if found.corrupt:
        raise SystemExit(1)


@cache.command()
@JSON
def clear(as_json: bool) -> None:
    """Remove every entry that is not in use."""
    from transom.artifacts import Cache

    _tell(Cache.default().clear(), as_json)


def _what(facts: Mapping[str, Any]) -> str:
    """A short description of an entry: model, backend and device of an artifact."""
    if "backend" in facts:
        file = os.path.basename(str(facts.get("source", "")))
        return f"{file} for {facts['backend']} on {facts.get('device', {}).get('id', '')}"
    return str(facts.get("name", ""))


def _tell(removed: object, as_json: bool) -> None:
    from transom.artifacts import Removed
    from transom.preparation.memory import size

    assert isinstance(removed, Removed)
    if as_json:
        print_json(removed)
        return
    kept = f"; in use and kept: {', '.join(removed.kept)}" if removed.kept else ""
    click.echo(f"Removed {removed.entries} entries, {size(removed.bytes)}{kept}")
