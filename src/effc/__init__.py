"""effc: a compiler for model efficiency.

    recipe = effc.parse("shrink.effc")            # text to a checked recipe
    plan   = effc.plan(recipe)                    # costs; reads no weight
    result = effc.compile(recipe, store=".effc")  # runs the stages
    model  = effc.load("out/small.effc")          # an nn.Module; also a Hugging Face folder or zoo:NAME

    m  = effc.trace(module, (x,))                 # graph rewriting without a recipe
    rw = effc.Rewriter(m)
    for hit in rw.match(effc.pattern("norm -> linear")): ...

Names are imported when first used: `import effc` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from effc.compiler.match import pattern
    from effc.compiler.rewrite import Rewriter
    from effc.compiler.trace import trace
    from effc.runtime.front import compile, load, parse, plan
    from effc.specs.diagnostic import Diagnostic, EffcError

_HOMES = {
    "Diagnostic": "effc.specs.diagnostic",
    "EffcError": "effc.specs.diagnostic",
    "Rewriter": "effc.compiler.rewrite",
    "compile": "effc.runtime.front",
    "load": "effc.runtime.front",
    "parse": "effc.runtime.front",
    "pattern": "effc.compiler.match",
    "plan": "effc.runtime.front",
    "trace": "effc.compiler.trace",
}

__all__ = [
    "Diagnostic",
    "EffcError",
    "Rewriter",
    "__version__",
    "compile",
    "load",
    "parse",
    "pattern",
    "plan",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # importlib.metadata takes as long as checking a recipe
        from importlib.metadata import version

        return version("effc")
    if name not in _HOMES:
        raise AttributeError(f"module 'effc' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
