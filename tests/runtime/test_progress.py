"""Progress as a person, a pipe and a program see it."""

from __future__ import annotations

import io
import json
import time

from effc.runtime.progress import Event, JsonLines, Lines, Live, sentence

EVENTS = [
    Event("start", "heal", "distill.logits"),
    Event("progress", "heal", done=1, of=4, unit="steps"),
    Event("progress", "heal", done=3, of=4, unit="steps"),
    Event("done", "heal", seconds=2.0),
    Event("cached", "small"),
    Event("waiting", "side", "process 7"),
]


def test_a_pipe_gets_plain_lines_with_rate_and_time_left() -> None:
    out = io.StringIO()
    show = Lines(out, every=0.0)
    for event in EVENTS:
        show(event)
        time.sleep(0.002)
    lines = out.getvalue().splitlines()
    assert lines[0] == "heal: distill.logits"
    assert lines[1] == "heal: 1 of 4 steps"
    assert lines[2].startswith("heal: 3 of 4 steps, ")
    assert lines[2].endswith("left")
    assert lines[4] == "small: taken from the store"
    assert lines[5] == "side: waits for process 7, which works on the same stage"


def test_machines_get_json_lines() -> None:
    out = io.StringIO()
    show = JsonLines(out)
    for event in EVENTS:
        show(event)
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert rows[1] == {"event": "progress", "name": "heal", "done": 1, "of": 4, "unit": "steps"}


def test_a_terminal_gets_a_bar_and_a_line_for_what_is_done() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    show = Live(out)
    for event in EVENTS:
        show(event)
    assert "heal: done in 2 s" in out.getvalue()
    assert "3 of 4 steps" in out.getvalue()


def test_every_event_has_a_sentence() -> None:
    assert all(event.name in sentence(event) for event in EVENTS)
