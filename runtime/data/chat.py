"""Conversations, with loss on what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from effc.runtime.data import _files, _lines
from effc.runtime.data._source import Document, Sequences
from effc.runtime.data._template import Template
from effc.runtime.data._vocabulary import Vocabulary
from effc.specs.diagnostic import Diagnostic, EffcError


class Chat(Sequences):
    """JSON lines of conversations; loss is taken on completions only, prompts are context.

    Every message has a `role` (system, user, assistant) and a `content`.
    """

    examples: ClassVar[tuple[str, ...]] = ('chat("talks.jsonl", messages = "messages", template = model)',)

    path: str = Field(min_length=1, description="file, folder or glob")
    messages: str = Field(
        default="messages", min_length=1, description="the field that holds the list of messages"
    )
    template: Literal["model"] | str = Field(
        default="model", description="`model` for the template of the model, or a jinja file in quotes"
    )

    def documents(self, vocabulary: Vocabulary) -> Sequence[Document]:
        template = Template(self._text(vocabulary), vocabulary)
        files, rows = _lines.rows(self.path)
        found = []
        for where, row in rows:
            text, spans = template.conversation(_messages(where, _lines.take(where, row, self.messages)))
            if spans:
                found.append(Document(text, where, spans))
        _files.refuse_empty(self.kind, files, found, "message of an assistant")
        return found

    def _text(self, vocabulary: Vocabulary) -> str:
        if self.template != "model":
            return _files.read(Path(self.template))
        if vocabulary.template is not None:
            return vocabulary.template
        raise EffcError(
            Diagnostic(
                "E626",
                "the model brings no chat template",
                notes=("neither chat_template.jinja nor tokenizer_config.json holds one",),
                help='name one with `template = "file.jinja"`',
            )
        )


def _messages(where: str, value: Any) -> list[dict[str, Any]]:
    """
    Raises: E623 when the value is not a list of messages.
    """
    if not isinstance(value, list) or not value:
        raise _lines.malformed(where, "has no list of messages", f"it is {type(value).__name__}")
    for i, message in enumerate(value):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            raise _lines.malformed(
                where, f"has a message {i + 1} without role and content", repr(message)[:80]
            )
    return value
