"""What keeps a student from learning from a teacher."""

from __future__ import annotations

import json

from effc.compiler.model import Model
from effc.specs.diagnostic import Diagnostic


def unlike_vocabularies(kind: str, student: Model, teacher: Model) -> list[Diagnostic]:
    """A teacher's probability for token i says nothing about another vocabulary's token i."""
    notes = []
    ours, theirs = _width(student), _width(teacher)
    if ours != theirs:
        notes.append(f"the student predicts {ours} tokens, the teacher {theirs}")
    elif _tokens(student) != _tokens(teacher):
        notes.append(f"both predict {ours} tokens, but number them in another way")
    if not notes:
        return []
    return [
        Diagnostic(
            "E652",
            f"`{kind}` needs student and teacher with one vocabulary",
            notes=tuple(notes),
            help="take as teacher the model that the student was made from",
            about="teacher",
        )
    ]


def _width(model: Model) -> int:
    """Rows of the head."""
    head = model.module("head")
    return int(getattr(head, "out_features", 0))


def _tokens(model: Model) -> object:
    """Token -> number; None where the model brings no tokenizer."""
    raw = model.tokenizer.files.get("tokenizer.json") if model.tokenizer else None
    if raw is None:
        return None
    told = json.loads(raw)
    return told.get("model", {}).get("vocab"), [(t["id"], t["content"]) for t in told.get("added_tokens", [])]
