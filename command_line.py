"""YAML files and flags become a Config; ``--help`` teaches; a user's mistake is one clear message and exit code 2.

Order: defaults < YAML files from left to right < flags (the last of a repeated flag wins). A flag is
``--section.key=value`` or ``--section.key value``; lists are written ``[a,b]``, null is ``null``.
"""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from config import BadInput, Config
from program import FINISHED

COMMAND_LINE = "on the command line"  # the origin of a flag


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
    draft = Draft()
    flags: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            draft.read(word)
        elif not word.startswith("--"):
            draft.mistakes.append(f"unknown flag {word!r}; flags look like --section.key=value")
        elif "=" in word:
            key, _, value = word[2:].partition("=")
            flags.append((key, value))
        elif rest and not rest[0].startswith("--"):
            flags.append((word[2:], rest.pop(0)))
        else:
            draft.mistakes.append(f"{word} needs a value, as in {word}=VALUE")
    for key, value in flags:
        draft.put(key, from_text(value, fields()[key]) if key in fields() else value, COMMAND_LINE)
    return draft.config()


@dataclass
class Draft:
    """What files and flags say, until all of it is known: ``{"section.key": value}``, who said it, and the mistakes."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    mistakes: list[str] = dataclasses.field(default_factory=list)

    def copy(self) -> Draft:
        """One that can be gone on with apart from this one."""
        return Draft(dict(self.values), dict(self.origins), list(self.mistakes))

    def read(self, path: str) -> None:
        """Add what a YAML file says."""
        try:
            self.put_sections(load_yaml(path, "config file", "configs"), path)
        except BadInput as problem:
            self.mistakes.append(str(problem))

    def put_sections(self, content: Any, origin: str) -> None:
        """Add nested sections, as a YAML file or a study's base holds them."""
        if content is not None and not isinstance(content, dict):
            kind = type(content).__name__
            self.mistakes.append(f"{origin} must hold sections such as 'model:' with keys below them, not a {kind}")
            return
        for section, keys in (content or {}).items():
            if section not in Config.model_fields:
                self.mistakes.append(unknown_key(str(section), origin))
            elif keys is not None and not isinstance(keys, dict):
                self.mistakes.append(f"'{section}' in {origin} must hold keys such as '{section}: {{key: value}}'")
            else:
                for key, value in (keys or {}).items():
                    self.put(f"{section}.{key}", value, origin)

    def put(self, key: str, value: Any, origin: str) -> None:
        """Add one knob's value."""
        if key not in fields():
            self.mistakes.append(unknown_key(key, origin))
            return
        if key in ("training.max_steps", "training.max_epochs") and value is not None:
            # The two exclude each other: the one said last replaces the one of an earlier file.
            other = "training.max_epochs" if key.endswith("steps") else "training.max_steps"
            if self.origins.get(other, origin) != origin:
                self.values[other] = None
        self.values[key], self.origins[key] = value, origin

    def nested(self) -> dict[str, dict[str, Any]]:
        """The values by section and key."""
        nested: dict[str, dict[str, Any]] = {}
        for name, value in self.values.items():
            section, _, key = name.partition(".")
            nested.setdefault(section, {})[key] = value
        return nested

    def config(self) -> Config:
        """The config; raises BadInput with all mistakes, each with its origin."""
        mistakes = list(self.mistakes)
        try:
            config = Config.model_validate(self.nested())
        except ValidationError as problem:
            errors = problem.errors(include_url=False)
            keys = [".".join(map(str, error["loc"][:2])) for error in errors]
            for key, error in zip(keys, errors, strict=True):
                mistakes.append(describe_error(key, error, self.origins.get(key), alternatives=keys.count(key) > 1))
        if mistakes:
            raise BadInput("\n".join(dict.fromkeys(mistakes)))
        return config


def from_mapping(nested: Any, origin: str) -> Config:
    """A Config from nested sections, as a run's config.yaml holds them."""
    draft = Draft()
    draft.put_sections(nested, origin)
    return draft.config()


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


def load_yaml(path: Path | str, what: str, examples: str = "") -> Any:
    """What the YAML file at ``path`` holds.

    Raises BadInput if it cannot be read, calling it ``what`` (such as "config file") and naming the nearest file below
    the directory ``examples`` if there is none at ``path``.
    """
    try:
        loader = UniqueKeys(Path(path).read_text(encoding="utf-8"))
        loader.name = str(path)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except FileNotFoundError:
        shipped = [str(file) for file in Path(examples).rglob("*.yaml")] if examples else []
        near = difflib.get_close_matches(str(path), shipped, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadInput(f"there is no {what} {str(path)!r}{hint}") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise BadInput(f"cannot read the {what} {str(path)!r}: {problem}") from None
    except yaml.YAMLError as problem:
        raise BadInput(f"{path} is not YAML: {' '.join(str(problem).split())}") from None


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


def unknown_key(key: str, origin: str) -> str:
    """The message for a key that does not exist, with the nearest that does."""
    place = origin if origin == COMMAND_LINE else f"in {origin}"
    if key in Config.model_fields:
        return f"'{key}' {place} is a section; give one of its keys, as in --{key}.KEY=VALUE"
    known = list(fields())
    last = key.rsplit(".", 1)[-1]
    near = [name for name in known if name.rsplit(".", 1)[-1] == last]  # the right key in the wrong section
    near = near or difflib.get_close_matches(key, known, 1, 0.6)
    near = near or difflib.get_close_matches(key, list(Config.model_fields), 1, 0.6)
    return f"unknown key '{key}' {place}" + (f"; did you mean {near[0]}?" if near else "; see --help for all keys")


def describe_error(key: str, error: Any, origin: str | None, alternatives: bool) -> str:
    """One line for one pydantic error: the knob, its value, where it was said, what it must be.

    ``alternatives``: the value failed each of several types, of which the knob's range names all.
    """
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should", "must").replace("String should", "must")
    if key not in fields():  # a condition over several keys of a section names them itself
        return message
    said = f" (from {origin})" if origin not in (None, "", COMMAND_LINE) else ""
    value = f"{key} = {error['input']!r}{said}"
    accepted = type_text(fields()[key])
    return f"{value}: must be {accepted}" if alternatives else f"{value}: {message} ({accepted})"


def dump(config: Config) -> str:
    """The config as YAML that reads back to exactly the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def default_text(field: FieldInfo) -> str:
    """The default of a knob as YAML has it."""
    if isinstance(field.default, tuple):
        return f"[{', '.join(map(str, field.default))}]"
    return str(yaml.safe_dump(field.get_default(), default_flow_style=True, width=200).splitlines()[0])


def doc_lines(field: FieldInfo) -> list[str]:
    """The doc of a knob as help shows it."""
    doc = " ".join((field.description or "").split())
    return textwrap.wrap(doc, 108, initial_indent="      ", subsequent_indent="      ")


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
            lines.append(f"  --{section}.{key}={default_text(field)}   ({type_text(field)})")
            lines += doc_lines(field)
        lines.append("")
    lines.append("exit codes: 0 finished, 2 bad input, 3 preempted (start again to go on), 4 failed")
    return "\n".join(lines)
