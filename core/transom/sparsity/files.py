"""Files that hold a sparsity policy: JSON objects with `format` 1, `about` for people, and fields of `Sparsity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transom.errors import OptionError

FORMAT = 1
_FOR_PEOPLE = ("format", "about", "model")


def policy_values(path: Path) -> dict[str, Any]:
    """The fields of a policy file, without comments.

    Raises:
        OptionError: it cannot be read, is not a JSON object, or has another format.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise OptionError(
            f"The sparsity policy {path} cannot be read: {reason}", "Give the path of a JSON file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is not JSON: {error}", "Write a JSON object with fields of a policy") from None
    if not isinstance(values, dict):
        raise OptionError(
            f"{path} does not contain a JSON object", 'Write one, such as {"preset": "balanced", "rows": 8}'
        )
    if values.get("format", FORMAT) != FORMAT:
        raise OptionError(
            f"{path} has format {values['format']!r}, and this Transom reads format {FORMAT}", "Create it again"
        )
    return {key: value for key, value in values.items() if key not in _FOR_PEOPLE}
