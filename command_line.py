"""YAML files and flags become a Config; ``--help`` teaches; a user's mistake is one clear message and exit code 2.

Order: defaults < YAML files from left to right < flags (the last of a repeated flag wins). A flag is
``--section.key=value`` or ``--section.key value``; lists are written ``[a,b]``, null is ``null``.
"""

from __future__ import annotations

import difflib
import textwrap
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from config import BadInput, Config
from program import FINISHED


def fields() -> dict[str, FieldInfo]:
    """Every knob by its full name, in the order of config.py."""
    return {
        f"{section}.{key}": field
        for section, model in Config.model_fields.items()
        for key, field in model.annotation.model_fields.items()  # type: ignore[union-attr]
    }


def parse(arguments: list[str], description: str = "") -> Config:
    """The config that the YAML files and flags in ``arguments`` describe.

    Raises BadInput with one line per mistake, all of them at once. ``--help`` prints every knob and exits.
    """
    if {"-h", "--help"} & set(arguments):
        print(help_text(description))
        raise SystemExit(FINISHED)
    values: dict[str, Any] = {}  # full name -> raw value
    places: dict[str, str] = {}  # full name -> the file that said it, "" for a flag
    mistakes: list[str] = []
    flags: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            read_yaml(word, values, places, mistakes)
        elif not word.startswith("--"):
            mistakes.append(f"unknown flag {word!r}; flags look like --section.key=value")
        elif "=" in word:
            key, _, value = word[2:].partition("=")
            flags.append((key, value))
        elif rest and not rest[0].startswith("--"):
            flags.append((word[2:], rest.pop(0)))
        else:
            mistakes.append(f"{word} needs a value, as in {word}=VALUE")
    for key, value in flags:
        if key not in fields():
            mistakes.append(unknown_key(key, "on the command line"))
            continue
        mistakes += put(key, from_text(value, fields()[key]), "", values, places)
    return make(values, places, mistakes)


def make(values: dict[str, Any], places: dict[str, str], mistakes: list[str] | None = None) -> Config:
    """A Config from ``{"section.key": value}``; raises BadInput with all mistakes, each with its place."""
    mistakes = list(mistakes or [])
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    try:
        config = Config.model_validate(nested)
    except ValidationError as problem:
        errors = problem.errors(include_url=False)
        keys = [".".join(map(str, error["loc"][:2])) for error in errors]
        for key, error in zip(keys, errors, strict=True):
            mistakes.append(describe_error(key, error, places, alternatives=keys.count(key) > 1))
    if mistakes:
        raise BadInput("\n".join(dict.fromkeys(mistakes)))
    return config


def from_mapping(nested: Any, place: str) -> Config:
    """A Config from nested sections, as a study's base or a run's config.yaml hold them."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    mistakes = put_sections(nested, place, values, places)
    return make(values, places, mistakes)


class UniqueKeys(yaml.SafeLoader):
    """The safe loader, but a key that stands twice in a mapping is a mistake; YAML lets the last one win."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                raise BadInput(f"{self.name}, line {line}: '{key.value}' is already given in line {first}; remove one")
            lines[key.value] = line
        return node


def load_yaml(path: Path | str) -> Any:
    """What the YAML file at ``path`` holds.

    Raises OSError, UnicodeDecodeError or yaml.YAMLError if it cannot be read, BadInput for a key that is there twice.
    """
    loader = UniqueKeys(Path(path).read_text(encoding="utf-8"))
    loader.name = str(path)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: str, values: dict[str, Any], places: dict[str, str], mistakes: list[str]) -> None:
    """Add what the YAML file at ``path`` says to ``values``, mistakes to ``mistakes``."""
    try:
        content = load_yaml(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(path, [str(p) for p in Path("configs").glob("*.yaml")], 1, 0.5)
        mistakes.append(f"there is no config file {path!r}" + (f"; did you mean {near[0]}?" if near else ""))
        return
    except (OSError, UnicodeDecodeError) as problem:
        mistakes.append(f"cannot read the config file {path!r}: {problem}")
        return
    except yaml.YAMLError as problem:
        mistakes.append(f"{path} is not YAML: {' '.join(str(problem).split())}")
        return
    except BadInput as problem:
        mistakes.append(str(problem))
        return
    mistakes += put_sections(content, path, values, places)


def put_sections(content: Any, place: str, values: dict[str, Any], places: dict[str, str]) -> list[str]:
    """Add nested sections to ``values`` and their ``place`` to ``places``; returns the mistakes in them."""
    if content is None:
        return []
    if not isinstance(content, dict):
        return [f"{place} must hold sections such as 'model:' with keys below them, not a {type(content).__name__}"]
    mistakes = []
    for section, keys in content.items():
        if section not in Config.model_fields:
            mistakes.append(unknown_key(str(section), f"in {place}"))
        elif keys is None:
            continue
        elif not isinstance(keys, dict):
            mistakes.append(f"'{section}' in {place} must hold keys such as '{section}: {{key: value}}'")
        else:
            for key, value in keys.items():
                mistakes += put(f"{section}.{key}", value, place, values, places)
    return mistakes


def put(key: str, value: Any, place: str, values: dict[str, Any], places: dict[str, str]) -> list[str]:
    """Add one knob's value to ``values`` and its ``place`` to ``places``; returns the mistakes."""
    if key not in fields():
        return [unknown_key(key, f"in {place}")]
    if key in ("training.max_steps", "training.max_epochs") and value is not None:
        # The two exclude each other: the one said last replaces the one of an earlier file.
        other = "training.max_epochs" if key.endswith("steps") else "training.max_steps"
        if places.get(other, place) != place:
            values[other] = None
    values[key], places[key] = value, place
    return []


def from_text(text: str, field: FieldInfo) -> Any:
    """A flag's text as the value of ``field``. Only lists are read as YAML: a path named 12:30 stays a path."""
    alternatives = [field.annotation, *get_args(field.annotation)]
    if type(None) in alternatives and text in ("null", "None", "~", ""):
        return None
    if any(get_origin(part) in (list, tuple) for part in alternatives):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


def unknown_key(key: str, place: str) -> str:
    """The message for a key that does not exist, with the nearest that does."""
    if key in Config.model_fields:
        return f"'{key}' {place} is a section; give one of its keys, as in --{key}.KEY=VALUE"
    known = list(fields())
    last = key.rsplit(".", 1)[-1]
    near = [name for name in known if name.rsplit(".", 1)[-1] == last]  # the right key in the wrong section
    near = near or difflib.get_close_matches(key, known, 1, 0.6)
    near = near or difflib.get_close_matches(key, list(Config.model_fields), 1, 0.6)
    return f"unknown key '{key}' {place}" + (f"; did you mean {near[0]}?" if near else "; see --help for all keys")


def describe_error(key: str, error: Any, places: dict[str, str], alternatives: bool) -> str:
    """One line for one pydantic error: the knob, its value, where it was said, what it must be.

    ``alternatives``: the value failed each of several types, of which the knob's range names all.
    """
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should", "must").replace("String should", "must")
    if key not in fields():  # a condition over several keys of a section names them itself
        return message
    place = places.get(key, "")
    said = f" (from {place})" if place else ""
    value = f"{key} = {error['input']!r}{said}"
    accepted = type_text(fields()[key])
    return f"{value}: must be {accepted}" if alternatives else f"{value}: {message} ({accepted})"


def dump(config: Config) -> str:
    """The config as YAML that reads back to exactly the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def type_text(field: FieldInfo) -> str:
    """Type and range of a knob in words, such as ``float >= 0, < 1``."""
    return f"{_annotation_text(field.annotation)} {_limits(field)}".strip()


def _limits(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{signs[name]} {getattr(m, name)}" for m in field.metadata for name in signs if hasattr(m, name)]
    return ", ".join(limits)


def _annotation_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return f"{_annotation_text(arguments[0])} {_limits(arguments[1])}"
    if origin is Literal:
        return "|".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return "|".join("null" if part is type(None) else _annotation_text(part) for part in arguments)
    if origin in (list, tuple):
        return "[" + ", ".join(_annotation_text(part) for part in arguments) + "]"
    return {str: "text", bool: "true|false"}.get(annotation, getattr(annotation, "__name__", str(annotation)))


def help_text(description: str) -> str:
    """Every knob with its doc, default and range."""
    lines = [description.strip(), "", "usage: [config.yaml ...] [--section.key=value ...]", ""]
    lines += ["Defaults < YAML files in order < flags. Lists are written [a,b], nothing is null.", ""]
    for section, model in Config.model_fields.items():
        page = model.annotation
        lines.append(f"{section}: {(page.__doc__ or '').strip()}")
        for key, field in page.model_fields.items():  # type: ignore[union-attr]
            default = yaml.safe_dump(field.get_default(), default_flow_style=True).splitlines()[0]
            default = f"[{', '.join(map(str, field.default))}]" if isinstance(field.default, tuple) else default
            lines.append(f"  --{section}.{key}={default}   ({type_text(field)})")
            doc = " ".join((field.description or "").split())
            lines += textwrap.wrap(doc, 108, initial_indent="      ", subsequent_indent="      ")
        lines.append("")
    lines.append("exit codes: 0 finished, 2 bad input, 3 preempted (start again to go on), 4 failed")
    return "\n".join(lines)
