"""Writes docs/presets.md: every field of a preset, what it takes and what the shipped presets have.

``python docs/presets.py`` after a change of a preset or of its fields.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml.core.yaml_files import YamlModel
from ml.training.presets import Preset, load_preset, preset_names

HEAD = """# Presets: every field

A preset is one YAML file in `ml/training/presets/` with a section `binary` and a section `subtype` of the same fields.
Every field has to be given, and an unknown one is an error. Where the two models differ, the table has both values:
binary / subtype. `python docs/presets.py` writes this page from the fields' own descriptions. What the presets are for,
and why they have these values, is explained in [training and promotion](training-and-promotion.md) and in the files.
"""


def fields(model: type[YamlModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Path, bounds or choices, and description of each field; of the two recipes, which are alike, the first."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        inner = next((k for k in (kind, *getattr(kind, "__args__", ())) if _is_section(k)), None)
        yield (*path, name), "" if inner else _takes(model, name), field.description or ""
        if inner and (*path, name) != ("subtype",):
            yield from fields(inner, (*path, name))


def _is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, YamlModel)


def _takes(model: type[YamlModel], name: str) -> str:
    schema = model.model_json_schema()["properties"][name]
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    bounds = " ".join(f"{word} {schema[key]:g}" for key, word in words.items() if key in schema)
    kinds = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`", "array": "list of numbers"}
    return " ".join(filter(None, (kinds.get(schema["type"], ""), bounds)))


def _value(preset: dict[str, Any], path: tuple[str, ...]) -> str:
    def of(start: dict[str, Any], keys: tuple[str, ...]) -> str:
        found: Any = start
        for key in keys:
            found = None if found is None else found[key]
        return found if isinstance(found, str) else json.dumps(found)

    if path[0] != "binary":
        return f"`{of(preset, path)}`"
    both = dict.fromkeys(of(preset[task], path[1:]) for task in ("binary", "subtype"))
    return " / ".join(f"`{value}`" for value in both)


def page() -> str:
    """The page as it should be."""
    names = preset_names()
    presets = {name: load_preset(name).model_dump(mode="json") for name in names}
    lines = [HEAD]
    heads = f"| field | | takes | {' | '.join(names)} |"
    rule = "|---" * (3 + len(names)) + "|"
    lines += ["## Of the file", "", heads, rule]
    for path, takes, description in fields(Preset):
        section = not takes and path[0] in ("binary", "subtype")
        if path[0] == "binary" and section and len(path) == 2:
            lines += ["", f"## `{path[1]}`", "", description, "", heads, rule]
        elif not section:
            name = ".".join(path[2:] or path)
            values = ["" if path == ("description",) else _value(presets[one], path) for one in names]
            lines.append(f"| `{name}` | {description} | {takes} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
