"""Chat templates: jinja text that a model's folder brings, rendered as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplate:
    """A model's template, or its named templates.

    Templates are other people's programs: they run in jinja's sandbox, where they cannot reach
    Python or change what they are given.

    Args:
        sources: name -> jinja text. "default" is used, or "tool_use" where it exists and `tools`
            are given; of a single template the name does not matter.

    Raises:
        ValueError: a text is no jinja template.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            self._templates = {
                name: environment.from_string(text) for name, text in sources.items()
            }
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"chat template: must be valid jinja, got line {error.lineno}: {error.message}"
            ) from None

    def render(self, **variables: Any) -> str:
        """The text for these variables; `tools` and `documents` are None unless given.

        Raises:
            ValueError: the template refuses them, or there is no template to use by default.
        """
        variables = {"tools": None, "documents": None} | variables
        try:
            return self._choose(variables["tools"]).render(**variables)
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: None + "text" in it
            raise ValueError(f"chat template: {error or type(error).__name__}") from None

    def _choose(self, tools: object) -> jinja2.Template:
        if len(self._templates) == 1:
            return next(iter(self._templates.values()))
        if tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        names = ", ".join(sorted(self._templates))
        raise ValueError(f"chat template: one must be named default, got {names}")


def read_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a model's folder: chat_template.jinja (and additional_chat_templates/), else
    the key chat_template of tokenizer_config.json. None if there is neither.

    Raises:
        ValueError: the key is neither a text nor a list of named texts.
    """
    file = folder / "chat_template.jinja"
    sources = {"default": file.read_text(encoding="utf-8")} if file.is_file() else {}
    for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        sources[extra.stem] = extra.read_text(encoding="utf-8")
    key = tokenizer_config.get("chat_template")
    if not sources and key is not None:
        sources = _sources_of(key)
    return ChatTemplate(sources) if sources else None


def _sources_of(key: object) -> dict[str, str]:
    if isinstance(key, str):
        return {"default": key}
    if isinstance(key, list) and all(isinstance(entry, dict) for entry in key):
        sources = {entry.get("name"): entry.get("template") for entry in key}
        if all(isinstance(name, str) and isinstance(text, str) for name, text in sources.items()):
            return sources
    rule = "a text, or a list of objects with name and template"
    raise ValueError(f"chat template: chat_template must be {rule}, got {key!r:.80}")


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training. Its contents are rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    # Unlike jinja's own, without escapes for HTML and with the key order of the input.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
