"""Where buffers lie: places are given again once nobody reads what they held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from effc.kernels.program.call import Call

_ALIGN = 64


def places(
    calls: Sequence[Call], widths: Mapping[str, int], aliases: Mapping[str, str]
) -> tuple[dict[str, int], int]:
    """Offset of each buffer in bytes a row, and the bytes a row of all together.

    A buffer lives from the call that writes it to the last that reads it; an alias lives in its owner.
    Calls of equal layers get equal places: they are given in one order, from the lowest that fits.
    """
    owner = {name: _owner(name, aliases) for name in widths}
    last: dict[str, int] = {}
    for i, call in enumerate(calls):
        for name in (*call.reads, *call.writes):
            last[owner.get(name, name)] = i
    offsets: dict[str, int] = {}
    taken: list[tuple[int, int, str]] = []  # start, end, buffer
    total = 0
    for i, call in enumerate(calls):
        for name in dict.fromkeys(owner[n] for n in call.writes if n in owner):
            if name in offsets:
                continue
            size = -(-max(widths[n] for n in widths if owner[n] == name) // _ALIGN) * _ALIGN
            start = _gap(taken, size)
            taken.append((start, start + size, name))
            offsets[name] = start
            total = max(total, start + size)
        taken = [t for t in taken if last[t[2]] > i]
    return {name: offsets[owner[name]] for name in widths if owner[name] in offsets}, total


def _gap(taken: Sequence[tuple[int, int, str]], size: int) -> int:
    start = 0
    for begin, end, _ in sorted(taken):
        if begin - start >= size:
            return start
        start = max(start, end)
    return start


def _owner(name: str, aliases: Mapping[str, str]) -> str:
    while name in aliases:
        name = aliases[name]
    return name
