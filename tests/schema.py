"""Whether what a command prints is as the shipped schema describes it, and no field in it is left undescribed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMAS = Path(__file__).parent / "schemas"
"""Of others: JUnit, SARIF."""
SCHEMA = json.loads((Path(__file__).parents[1] / "certify_cli" / "schema" / "curvcert-1.json").read_text())


def validator(part: str = "") -> jsonschema.Draft202012Validator:
    """Of the document of certify, or of a part under $defs."""
    schema: Any = SCHEMA if not part else {"$ref": f"#/$defs/{part}", "$defs": SCHEMA["$defs"]}
    return jsonschema.Draft202012Validator(schema)


def conforms(text: str, part: str) -> bool:
    """Raises where the text is not valid; False where it holds a field that is not described."""
    document = json.loads(text)
    validator(part).validate(document)
    return _described(document, SCHEMA["$defs"][part])


def _described(value: Any, schema: dict[str, Any]) -> bool:
    if "$ref" in schema:
        return True  # described, and compared with its dataclass, elsewhere
    if isinstance(value, list):
        return all(_described(item, schema.get("items", {})) for item in value)
    if isinstance(value, dict) and "properties" in schema:
        return all(
            key in schema["properties"] and _described(item, schema["properties"][key]) for key, item in value.items()
        )
    return True
