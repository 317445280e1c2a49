"""effc: a compiler for model efficiency.

    recipe = effc.parse("shrink.effc")            # text to a checked recipe
    plan   = effc.plan(recipe)                    # costs; reads no weight
    result = effc.compile(recipe, store=".effc")  # runs the stages
    model  = effc.load("out/small.effc")          # an nn.Module; also a Hugging Face folder or zoo:NAME

    m  = effc.trace(module, (x,))                 # graph rewriting without a recipe
    rw = effc.Rewriter(m)
    for hit in rw.match(effc.pattern("norm -> linear")): ...

    @effc.rule("fold", "norm[users=1] -> linear", contract=effc.EXACT)
    def fold(rw, hit): ...                        # and effc.Pipeline([fold]).run(m), verified

Names are imported when first used: `import effc` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from effc.compiler.contract import EXACT, LOSSY, WITHIN
    from effc.compiler.instruments import Dump, Equality, Timing
    from effc.compiler.pattern import pattern
    from effc.compiler.pipeline import Pipeline
    from effc.compiler.rewrite import Rewriter
    from effc.compiler.rule import Ruled, rule
    from effc.compiler.trace import trace
    from effc.runtime.front import compile, load, parse, plan
    from effc.specs.diagnostic import Diagnostic, EffcError

HOMES = {
    "Diagnostic": "effc.specs.diagnostic",
    "Dump": "effc.compiler.instruments",
    "EXACT": "effc.compiler.contract",
    "EffcError": "effc.specs.diagnostic",
    "Equality": "effc.compiler.instruments",
    "LOSSY": "effc.compiler.contract",
    "Pipeline": "effc.compiler.pipeline",
    "Rewriter": "effc.compiler.rewrite",
    "Ruled": "effc.compiler.rule",
    "Timing": "effc.compiler.instruments",
    "WITHIN": "effc.compiler.contract",
    "compile": "effc.runtime.front",
    "load": "effc.runtime.front",
    "parse": "effc.runtime.front",
    "pattern": "effc.compiler.pattern",
    "plan": "effc.runtime.front",
    "rule": "effc.compiler.rule",
    "trace": "effc.compiler.trace",
}

__all__ = [
    "EXACT",
    "LOSSY",
    "WITHIN",
    "Diagnostic",
    "Dump",
    "EffcError",
    "Equality",
    "Pipeline",
    "Rewriter",
    "Ruled",
    "Timing",
    "__version__",
    "compile",
    "load",
    "parse",
    "pattern",
    "plan",
    "rule",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # importlib.metadata takes as long as checking a recipe
        from importlib.metadata import version

        return version("effc")
    if name == "testing":
        return import_module("effc.testing")
    if name not in HOMES:
        raise AttributeError(f"module 'effc' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
