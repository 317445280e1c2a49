"""Model structure to JSON and back: nodes, module table, roles, ties; never a pickle or a class by path.

    {"format": 1, "architecture": "llama", "config": {...},
     "nodes": [["input", "ids"], ["input", "step"], ["block", "embedding", [0, 1], "load"],
               ["add", [3, 5], "load"], ["output", [9]]],
     "modules": {"layers.0.mlp": {"type": "MLP", ...}, "layers.0.mlp.up": {"type": "QuantLinear", ...}},
     "roles": {path: [name, layer]}, "ties": {alias: owner}}

Node arguments are indices of earlier nodes. `modules` holds every block, and those units inside a block
that differ from what the block's constructor makes.
"""

from __future__ import annotations

import keyword
import operator
import pkgutil
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NoReturn

from torch import fx, nn

from effc.compiler import blocks
from effc.compiler.assemble import module_of
from effc.compiler.blocks import Unit
from effc.compiler.model import Model
from effc.compiler.roles import ROLES, Role
from effc.compiler.sharing import tie
from effc.specs.diagnostic import Diagnostic, EffcError

FORMAT = 1
MAX_NODES = 50_000
MAX_MODULES = 50_000
_PATH = re.compile(r"^[a-z][a-z0-9_]{0,40}(\.[a-z0-9][a-z0-9_]{0,40}){0,9}$")
_TAKEN = {name for name in dir(nn.Module) if not name.startswith("_")} | {"graph", "code", "recompile"}


def to_json(model: Model) -> dict[str, Any]:
    """The structure of a model as plain data; weights are not in it.

    Raises:
        EffcError: E405 when a module is no unit (a traced model), which JSON cannot express.
    """
    nodes: list[list[Any]] = []
    index: dict[fx.Node, int] = {}
    modules: dict[str, Any] = {}
    for node in model.gm.graph.nodes:
        index[node] = len(nodes)
        args = [index[a] for a in node.args if isinstance(a, fx.Node)]
        origin = node.meta.get("origin", "")
        if node.op == "placeholder":
            nodes.append(["input", str(node.target)])
        elif node.op == "call_module":
            nodes.append(["block", node.target, args, origin])
            _tabulate(str(node.target), model.module(str(node.target)), modules)
        elif node.op == "call_function" and node.target is operator.add:
            nodes.append(["add", args, origin])
        elif node.op == "output":
            nodes.append(["output", args])
        else:
            raise EffcError(
                Diagnostic("E405", f"the graph calls {node.target}, which an artefact cannot hold")
            )
    return {
        "format": FORMAT,
        "architecture": model.architecture,
        "config": model.config,
        "nodes": nodes,
        "modules": modules,
        "roles": {path: role.as_json() for path, role in model.roles.items()},
        "ties": model.ties(),
    }


def _tabulate(path: str, module: nn.Module, table: dict[str, Any]) -> None:
    """Write a unit's spec, and those of children that its constructor would not make."""
    if not isinstance(module, Unit):
        what = type(module).__name__
        raise EffcError(Diagnostic("E405", f"`{path}` is {what}, which an artefact cannot hold"))
    table[path] = module.spec()
    _differing(path, module, Unit.from_spec(module.spec()), table)


def _differing(path: str, module: nn.Module, blank: nn.Module, table: dict[str, Any]) -> None:
    for name, child in module._modules.items():
        if child is None:
            continue
        made = blank._modules.get(name)
        same = isinstance(child, Unit) and isinstance(made, Unit) and made.spec() == child.spec()
        if same and made is not None:
            _differing(f"{path}.{name}", child, made, table)
        else:
            _tabulate(f"{path}.{name}", child, table)


def from_json(data: Any) -> Model:
    """The model a JSON value describes, on the meta device, without weights and tokenizer.

    Raises:
        EffcError: E406 for anything unexpected; nothing in `data` is trusted.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        _refuse(f"`format` is not {FORMAT}")
    table, nodes = data.get("modules"), data.get("nodes")
    if not isinstance(table, Mapping) or len(table) > MAX_MODULES:
        _refuse(f"`modules` is no table of at most {MAX_MODULES} entries")
    if not isinstance(nodes, list) or len(nodes) > MAX_NODES:
        _refuse(f"`nodes` is no list of at most {MAX_NODES} entries")
    _import_blocks()
    modules = _modules(table)
    graph, called = _graph(nodes, modules)
    gm = module_of(called, graph)
    _ties(gm, data.get("ties", {}))
    config, architecture = data.get("config", {}), data.get("architecture", "")
    if not isinstance(config, Mapping) or not isinstance(architecture, str):
        _refuse("`config` or `architecture` has the wrong type")
    model = Model(gm, _roles(gm, data.get("roles", {})), config=config, architecture=architecture)
    _fits_together(model)
    return model


def _fits_together(model: Model) -> None:
    """Blocks that feed each other agree on the width of the stream."""
    if not isinstance(getattr(model.gm, "embedding", None), Unit):
        _refuse("there is no `embedding`")
    width: dict[fx.Node, int | None] = {}
    for node in model.gm.graph.nodes:
        given = [width[a] for a in node.all_input_nodes if width.get(a) is not None]
        due, out = _sides(model.module(str(node.target))) if node.op == "call_module" else (None, None)
        takes_ids = str(node.target) == "embedding"
        if len(set(given)) > 1 or (given and due not in (None, given[0]) and not takes_ids):
            _refuse(f"the blocks do not fit each other: {node.target} takes {due}, gets {given}")
        width[node] = out if out is not None else next(iter(given), None)


def _sides(unit: nn.Module) -> tuple[int | None, int | None]:
    """The widths a unit takes and gives; None where any will do."""
    width = getattr(unit, "width", None)
    return getattr(unit, "in_features", width), getattr(unit, "out_features", width)


def _import_blocks() -> None:
    """Every unit type of the house registers when its file is imported."""
    for found in pkgutil.iter_modules(blocks.__path__):
        import_module(f"{blocks.__name__}.{found.name}")


def _modules(table: Mapping[Any, Any]) -> dict[str, nn.Module]:
    """Top-level blocks by path, differing children put in place."""
    made: dict[str, nn.Module] = {}
    for path in sorted(table, key=lambda p: str(p).count(".")):
        check_path(path)
        spec = table[path]
        if not isinstance(spec, Mapping):
            _refuse(f"`modules.{path}` is no mapping")
        try:
            unit = Unit.from_spec(spec)
        except (ValueError, RuntimeError, OverflowError) as error:
            _refuse(f"`modules.{path}`: {error}")
        owner = next((p for p in _above(path) if p in made), None)
        if owner is None:
            made[path] = unit
            continue
        inner, _, name = path.removeprefix(owner + ".").rpartition(".")
        try:
            parts = made[owner].get_submodule(inner)._modules
            before = parts[name]
        except (AttributeError, KeyError):
            _refuse(f"`modules.{path}` is no part of its block")
        if _measures(before) != _measures(unit):
            _refuse(f"`modules.{path}` does not fit its block: {_measures(unit)}, not {_measures(before)}")
        parts[name] = unit
    return made


def _measures(unit: nn.Module | None) -> tuple[Any, ...]:
    """What must be the same of a part and of what stands in its place."""
    names = ["in_features", "out_features", "width"] + ["rows"] * isinstance(unit, blocks.Table)
    return tuple(getattr(unit, name, None) for name in names)


def check_path(path: Any) -> None:
    """Only plain dotted words may become attributes of a module (they also reach generated code)."""
    if not isinstance(path, str) or not _PATH.match(path):
        _refuse(f"{str(path)[:60]!r} is no module path")
    for word in path.split("."):
        if keyword.iskeyword(word) or word in _TAKEN:
            _refuse(f"{path!r} uses the reserved word {word!r}")


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _graph(nodes: list[Any], modules: dict[str, nn.Module]) -> tuple[fx.Graph, dict[str, nn.Module]]:
    graph = fx.Graph()
    made: list[fx.Node] = []
    called: dict[str, nn.Module] = {}

    def earlier(args: Any) -> tuple[fx.Node, ...]:
        good = isinstance(args, list) and 0 < len(args) <= 8 and all(type(a) is int for a in args)
        if not good or not all(0 <= a < len(made) for a in args):
            _refuse(f"node {len(made)} reads {str(args)[:60]}, which is not before it")
        return tuple(made[a] for a in args)

    for place, entry in enumerate(nodes):
        match entry:
            case ["input", "ids" | "step" as name] if place == ["ids", "step"].index(name):
                made.append(graph.placeholder(name))
            case ["block", str(path), args, str(origin)] if path in modules and path not in called:
                called[path] = modules[path]
                made.append(graph.call_module(path, _arity(path, modules[path], earlier(args))))
                made[-1].meta["origin"] = origin[:64]
            case ["add", [_, _] as args, str(origin)]:
                made.append(graph.call_function(operator.add, earlier(args)))
                made[-1].meta["origin"] = origin[:64]
            case ["output", [_] as args] if place == len(nodes) - 1:
                made.append(graph.output(earlier(args)[0]))
            case _:
                _refuse(f"node {place} is not understood: {str(entry)[:80]}")
    if not made or made[-1].op != "output" or len(made) < 3:
        _refuse("the nodes do not begin with ids and step and end with an output")
    if unused := sorted(set(modules) - set(called)):
        _refuse(f"`modules.{unused[0]}` is called by no node")
    return graph, called


def _arity(path: str, module: nn.Module, args: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    due = 2 if isinstance(module, Unit) and module.takes_step else 1
    if len(args) != due or (due == 2 and args[1].name != "step") or args[0].name == "step":
        _refuse(f"the block `{path}` takes {'(x, step)' if due == 2 else 'x alone'}")
    return args


def _ties(gm: fx.GraphModule, ties: Any) -> None:
    if not isinstance(ties, Mapping) or len(ties) > MAX_MODULES:
        _refuse("`ties` is no table of names")
    for alias, owner in ties.items():
        if not isinstance(alias, str) or not isinstance(owner, str):
            _refuse("`ties` is no table of names")
        try:
            tie(gm, alias, owner)
        except (AttributeError, KeyError, ValueError) as error:
            _refuse(f"`{alias}` cannot be tied to `{owner}`: {error}")


def _roles(gm: fx.GraphModule, roles: Any) -> dict[str, Role]:
    if not isinstance(roles, Mapping) or len(roles) > MAX_MODULES:
        _refuse("`roles` is no table")
    paths = {path for path, _ in gm.named_modules()}
    found: dict[str, Role] = {}
    for path, value in roles.items():
        match value:
            case [str(name), int() | None as layer] if path in paths and name in ROLES:
                found[path] = Role(name, layer)
            case _:
                _refuse(f"`roles.{str(path)[:60]}` is no role of a module: {str(value)[:60]}")
    return found


def _refuse(what: str) -> NoReturn:
    raise EffcError(Diagnostic("E406", "the graph of the artefact cannot be read", notes=(what,)))
