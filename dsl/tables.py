"""The grammar as tables: grammar.lark through lark once, then a table of states that a small loop runs.

lark takes about as long to import and to compile a grammar as everything else that `effc check` does. So its
result, plain data of 10 kB, is kept in the user's cache under the hash of the grammar; `dsl/text.py` runs it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from effc.specs import user_cache

STARTS = ("statement", "comparison", "value")
_FORMAT = "1"
"""Raised when the shape of the kept data changes."""
_IGNORED = ("COMMENT", "BLANK")


@dataclass(frozen=True, slots=True)
class Rule:
    """origin -> size symbols; names that begin with an underscore dissolve into their parent."""

    origin: str
    size: int


@dataclass(frozen=True, slots=True)
class Tables:
    lexer: re.Pattern[str]
    keywords: dict[str, str]
    """Word -> terminal, for words that are keywords where the grammar asks for them."""
    dropped: frozenset[str]
    """Terminals that carry nothing: brackets, commas, keywords."""
    rules: tuple[Rule, ...]
    states: tuple[dict[str, int], ...]
    """State -> symbol -> next state (n >= 0) or rule ~n to reduce."""
    start: dict[str, tuple[int, int]]
    """Start symbol -> first state, accepting state."""


@cache
def tables() -> Tables:
    grammar = files("effc.dsl").joinpath("grammar.lark").read_text(encoding="utf-8")
    key = hashlib.blake2b((_FORMAT + grammar).encode(), digest_size=16).hexdigest()
    data = user_cache.read("grammar.json", key)
    if data is None:
        data = compile_grammar(grammar)
        user_cache.write("grammar.json", key, data)
    return Tables(
        lexer=re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in data["patterns"])),
        keywords=data["keywords"],
        dropped=frozenset(data["dropped"]),
        rules=tuple(Rule(*rule) for rule in data["rules"]),
        states=tuple(data["states"]),
        start={name: (first, last) for name, (first, last) in data["start"].items()},
    )


def compile_grammar(grammar: str) -> dict[str, Any]:
    """Run lark over the grammar and keep what a table-driven parser needs, as JSON."""
    from lark import Lark
    from lark.grammar import Rule as LarkRule
    from lark.lexer import TerminalDef

    lark = Lark(grammar, parser="lalr", start=list(STARTS), maybe_placeholders=False)
    data, memo = lark.memo_serialize([TerminalDef, LarkRule])
    table = data["parser"]["parser"]
    rules: list[tuple[str, int]] = []
    number: dict[int, int] = {}
    dropped: set[str] = set()
    for place, item in memo.items():
        if item["__type__"] != "Rule":
            continue
        number[place] = len(rules)
        rules.append((item["origin"]["name"], len(item["expansion"])))
        dropped |= {symbol["name"] for symbol in item["expansion"] if symbol.get("filter_out")}
    states: list[dict[str, int]] = [{} for _ in range(1 + max(table["states"]))]
    for state, actions in table["states"].items():
        for token, (reduces, target) in actions.items():
            action = ~number[target["@"]] if reduces else target
            states[state][table["tokens"][token]] = action
    terminals = [item for item in memo.values() if item["__type__"] == "TerminalDef"]
    plain = [t for t in terminals if t["pattern"]["__type__"] == "PatternStr"]
    signs = [t for t in plain if not t["pattern"]["value"].isalpha()]
    shaped = [t for t in terminals if t["pattern"]["__type__"] == "PatternRE"]
    shaped.sort(key=lambda t: -t["priority"])
    return {
        "patterns": [(t["name"], t["pattern"]["value"]) for t in shaped]
        + [(t["name"], re.escape(t["pattern"]["value"])) for t in signs],
        "keywords": {t["pattern"]["value"]: t["name"] for t in plain if t not in signs},
        "dropped": sorted(dropped),
        "rules": rules,
        "states": states,
        "start": {name: (table["start_states"][name], table["end_states"][name]) for name in STARTS},
    }
