"""Where a problem was written: a diagnostic that knows its argument gets the span of that argument."""

from __future__ import annotations

import re
from dataclasses import replace

from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.recipe import Call
from effc.specs.source import Span

_LAST = re.compile(r"(?:\.[^.\[\]]+|\[\d+\])\Z")


def placed(diagnostic: Diagnostic, call: Call) -> Diagnostic:
    """The diagnostic with a label; one that has a place of its own keeps it."""
    span = None if diagnostic.labels else written(call, diagnostic.about)
    return diagnostic if span is None else replace(diagnostic, labels=(Label(span),))


def written(call: Call, about: str = "") -> Span | None:
    """The span of an argument such as "group" or "rules[1].on"; the name of the call where none was written.

    An argument that stands in a single rule alone is found there.
    """
    path = about
    while path:
        if path in call.spans:
            return call.spans[path]
        shorter = _LAST.sub("", path)
        path = shorter if shorter != path else ""
    ruled = [
        span for key, span in call.spans.items() if key.startswith("rules[") and key.endswith(f"].{about}")
    ]
    if len(ruled) == 1:
        return ruled[0]
    if call.span is None:
        return None
    name = Span(call.span.source, call.span.start, call.span.start + len(call.kind))
    return name if name.text == call.kind else call.span
