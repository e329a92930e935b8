"""`qmerge_report.json`: the whole result, indented, with lists of numbers on one line."""

from __future__ import annotations

import json
from typing import Any

from qmerge.results import RunResult


def render(result: RunResult) -> str:
    """Strict JSON (no NaN, no Infinity) in the order of the record's fields."""
    return _text(result.to_dict(), "") + "\n"


def _text(value: Any, indent: str) -> str:
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        parts = [f"{deeper}{_plain(key)}: {_text(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(deeper + _text(item, deeper) for item in value) + f"\n{indent}]"
    return _plain(value)


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
