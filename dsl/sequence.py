"""The order of making: bindings so that each comes after those it names; circles are told."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter

from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.recipe import Binding, refs


def in_order(bindings: dict[str, Binding], problems: list[Diagnostic]) -> list[Binding]:
    """Bindings so that each comes after those it names, otherwise as written; a circle is reported."""
    graph = {
        name: [ref.name for ref in (*binding.call.models, *refs(binding.call.arguments))]
        for name, binding in bindings.items()
    }
    _drop_orphans(bindings, graph)
    order = list(bindings)
    try:
        sorter = TopologicalSorter(graph)
        sorter.prepare()
    except CycleError as circle:
        names: list[str] = list(dict.fromkeys(reversed(circle.args[1])))
        start = min(range(len(names)), key=lambda i: order.index(names[i]))
        names = names[start:] + names[:start]
        first = bindings[names[0]]
        arrow = " -> ".join((*names, names[0]))
        title = f"`{names[0]}` needs itself" if len(names) == 1 else "stages need each other in a circle"
        labels = [Label(b.span) for n in names if (b := bindings[n]).span] or [Label(first.span)]  # type: ignore[arg-type]
        problems.append(
            Diagnostic(
                "E207",
                title,
                labels[:4],
                [f"{arrow}, where -> is needs"] if len(names) > 1 else [],
                help=f"let `{names[0]}` start from a model that is loaded{_such_as(bindings)}",
            )
        )
        return []
    rank = {name: place for place, name in enumerate(order)}
    done: list[Binding] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=rank.__getitem__)
        done += [bindings[name] for name in ready]
        sorter.done(*ready)
    return _stable(done, graph, rank)


def _such_as(bindings: dict[str, Binding]) -> str:
    loaded = [name for name, binding in bindings.items() if binding.keyword == "model"]
    return f", such as {loaded[0]}" if loaded else ""


def _drop_orphans(bindings: dict[str, Binding], graph: dict[str, list[str]]) -> None:
    """Take out bindings that need one that has an error, and what needs those."""
    users: dict[str, list[str]] = {}
    for name, needs in graph.items():
        for need in needs:
            users.setdefault(need, []).append(name)
    todo = [need for need in users if need not in bindings]
    while todo:
        for user in users.get(todo.pop(), ()):
            if user in bindings:
                del bindings[user], graph[user]
                todo.append(user)


def _stable(bindings: Sequence[Binding], graph: dict[str, list[str]], rank: dict[str, int]) -> list[Binding]:
    """Keep the order of the page where it is already an order of making."""
    place = {b.name: rank[b.name] for b in bindings}
    forward = all(place[need] < place[name] for name, needs in graph.items() for need in needs)
    return sorted(bindings, key=lambda b: rank[b.name]) if forward else list(bindings)
