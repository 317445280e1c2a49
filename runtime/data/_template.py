"""Chat templates: a conversation to text, in a sandbox, and which characters the assistant wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from effc.runtime.data._vocabulary import Vocabulary
from effc.specs.diagnostic import Diagnostic, EffcError

Message = Mapping[str, Any]


class Template:
    """A compiled chat template with the special tokens of a vocabulary."""

    def __init__(self, text: str, vocabulary: Vocabulary) -> None:
        """
        Raises: E626 when the text is not a template.
        """
        room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        room.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        room.globals["raise_exception"] = _refuse
        self._tokens = {name: vocabulary.token(name) or "" for name in ("bos_token", "eos_token")}
        try:
            self._template = room.from_string(text)
        except TemplateError as problem:
            raise _broken(str(problem)) from problem

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The text of a conversation; with `prompt`, up to where the assistant begins to write.

        Raises: E626 when the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=prompt, tools=None, **self._tokens
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as problem:
            raise _broken(str(problem)) from problem

    def conversation(self, messages: Sequence[Message]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text, and the character ranges that the assistant wrote.

        A range begins where the prompt for it ends and ends where the conversation up to it ends.

        Raises: E626 when the template writes earlier turns differently once later ones follow.
        """
        whole = self.render(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            opening = self.render(messages[:i], prompt=True)
            closing = self.render(messages[: i + 1])
            if not (whole.startswith(closing) and closing.startswith(opening)):
                raise _broken(
                    f"turn {i + 1} reads differently on its own, so its completion cannot be marked"
                )
            spans.append((len(opening), len(closing)))
        return whole, tuple(spans)


def _refuse(message: str) -> NoReturn:
    """What templates call as `raise_exception`."""
    raise TemplateError(message)


def _broken(note: str) -> EffcError:
    return EffcError(
        Diagnostic(
            "E626",
            "the chat template cannot be used",
            notes=(note.splitlines()[0] if note else "no reason given",),
            help='write `template = "file.jinja"` to use another one',
        )
    )
