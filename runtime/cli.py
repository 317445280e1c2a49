"""The `effc` command: one table of verbs; each verb imports what it needs when it runs.

A verb is a function `verb(options: argparse.Namespace) -> int` in the module its row names. It returns the
exit code: 0 done, 1 a problem in the input, 2 usage, 3 a contract or an `expect` failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effc.specs.diagnostic import Diagnostic

INTERRUPTED = 130
KERNELS = ("auto", "c", "triton", "triton-int8", "triton-float8", "torch")
"""What may run a model; auto is chosen by what the model is and where its weights are."""


@dataclass(frozen=True, slots=True)
class Verb:
    summary: str
    home: str
    """Module that holds the function; the function has the name of the verb."""
    declare: Callable[[argparse.ArgumentParser], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; never raises for a problem in the input."""
    words = list(sys.argv[1:] if argv is None else argv)
    unknown = words and not words[0].startswith("-") and words[0] not in VERBS
    if unknown:
        near = get_close_matches(words[0], VERBS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"it has: {', '.join(VERBS)}"
        print(f"effc: no command is called `{words[0]}`; {hint}", file=sys.stderr)
        return 2
    try:
        options = _parser(words[0] if words else "").parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    if options.verb is None:
        _parser("").print_help(sys.stderr)
        return 2
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    from effc.specs.diagnostic import Diagnostic, EffcError

    verb = VERBS[options.verb]
    try:
        function = getattr(import_module(verb.home), options.verb)
        return int(function(options))
    except EffcError as problem:
        return _refuse(problem.diagnostics, options)
    except KeyboardInterrupt:
        print("effc: interrupted; the same command goes on from the last finished unit", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # silences the flush at exit
        return 0
    except OSError as problem:
        where = f"`{problem.filename}`" if problem.filename else "the file"
        note = f"the system says: {problem.strerror or problem}"
        return _refuse([Diagnostic("E690", f"{where} cannot be read or written", notes=(note,))], options)


def _refuse(diagnostics: Sequence[Diagnostic], options: argparse.Namespace) -> int:
    if getattr(options, "json", False):
        print(json.dumps({"diagnostics": [d.as_json() for d in diagnostics]}, indent=2))
    else:
        print("\n\n".join(d.render() for d in diagnostics), file=sys.stderr)
    return 1


def _parser(chosen: str) -> argparse.ArgumentParser:
    """The parser; only the chosen verb declares its arguments, which keeps `effc check` quick."""
    parser = argparse.ArgumentParser(
        prog="effc", description="A compiler for model efficiency: recipes in, smaller models out."
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", title="commands")
    for name, verb in VERBS.items():
        child = verbs.add_parser(name, help=verb.summary, description=verb.summary)
        if name == chosen:
            verb.declare(child)
            child.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from importlib.metadata import version

        print(f"effc {version('effc')}")
        parser.exit(0)


# ---- what each verb takes


def _recipe(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe", type=Path, help="a recipe, its YAML twin, or an artefact that holds one")
    p.add_argument(
        "-p", dest="params", action="append", default=[], metavar="NAME=VALUE",
        help="set a `param` of the recipe; several values with commas give one run each",
    )  # fmt: skip


def _place(p: argparse.ArgumentParser) -> None:
    p.add_argument("--store", type=Path, default=Path(".effc"), help="where results are kept (./.effc)")
    p.add_argument("--target", type=Path, help="description of the machine (default: the calibrated one)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="where stages run")


def _check(p: argparse.ArgumentParser) -> None:
    _recipe(p)
    _place(p)


def _plan(p: argparse.ArgumentParser) -> None:
    _recipe(p)
    _place(p)
    p.add_argument("--tiny", action="store_true", help="plan the small random copy that --tiny compiles")


def _compile(p: argparse.ArgumentParser) -> None:
    _recipe(p)
    _place(p)
    p.add_argument("--tiny", action="store_true", help="run on a small random copy of the models, in seconds")
    p.add_argument("--report", type=Path, help="also write the report page here")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _sampling(p: argparse.ArgumentParser) -> None:
    _model(p)
    p.add_argument("--prompt", action="append", default=[], help="text to go on from; may be repeated")
    p.add_argument("--prompts", type=Path, help="a file of prompts, one a line, run as one batch")
    p.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    p.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of mass P")
    p.add_argument("--seed", type=int, default=0)
    _kernels(p)


def _kernels(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--kernels", choices=KERNELS, default="auto",
        help="auto: a C program, or Triton kernels on a GPU, where the model has them (default), else torch; "
        "triton-int8 and triton-float8 make rows bytes before linear layers",
    )  # fmt: skip
    p.add_argument(
        "--isa", choices=("amx", "avx512", "avx2", "portable"), help="instructions of the C program"
    )


def _model(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", help="an artefact, a Hugging Face folder or zoo:NAME")
    _place(p)


def _bench(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", nargs="?", help="an artefact, a Hugging Face folder or zoo:NAME")
    _place(p)
    p.add_argument("--calibrate", action="store_true", help="measure this machine; plans use the result")
    p.add_argument("--data", default="python-stdlib", help="a corpus by name, or text files, for the loss")
    p.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    p.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    p.add_argument("--batch", type=int, default=1)
    _kernels(p)
    p.add_argument(
        "--against", choices=("transformers",), help="also run the same weights, dense, in transformers"
    )


def _show(p: argparse.ArgumentParser) -> None:
    p.add_argument("what", help="a recipe, an artefact, a Hugging Face folder or zoo:NAME")
    _place(p)
    p.add_argument("--stage", help="of an artefact: the report of this stage alone")


def _diff(p: argparse.ArgumentParser) -> None:
    p.add_argument("left", help="a recipe, an artefact, a Hugging Face folder or zoo:NAME")
    p.add_argument("right", help="the same kind of thing")
    _place(p)
    p.add_argument("--tensors", action="store_true", help="list every tensor, equal ones too")


def _verify(p: argparse.ArgumentParser) -> None:
    p.add_argument("artefact", type=Path)
    _place(p)
    p.add_argument("--deep", action="store_true", help="also measure again and load with the real consumer")


def _explain(p: argparse.ArgumentParser) -> None:
    p.add_argument("what", help="a code (E301), a method (quantize.gptq) or an artefact")
    p.add_argument("stage", nargs="?", help="of an artefact: the stage")
    _place(p)
    p.add_argument("--kernels", choices=KERNELS[1:-1], help="of an artefact: which kernels to name")


def _methods(p: argparse.ArgumentParser) -> None:
    p.add_argument("kind", nargs="?", help="a method, part or family (default: all)")


def _fmt(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe", type=Path)
    p.add_argument("--to", choices=("text", "yaml"), default=None, help="the form to print")
    p.add_argument("--write", action="store_true", help="rewrite the file instead of printing")
    p.add_argument("--check", action="store_true", help="exit 1 if the file is not in canonical form")


def _schema(p: argparse.ArgumentParser) -> None:
    p.add_argument("kind", nargs="?", help="a method or part (default: the whole recipe)")


def _cache(p: argparse.ArgumentParser) -> None:
    p.add_argument("action", choices=("ls", "why-miss", "gc"))
    p.add_argument("recipe", nargs="?", type=Path, help="why-miss: the recipe")
    p.add_argument("stage", nargs="?", help="why-miss: the stage (default: all)")
    p.add_argument("-p", dest="params", action="append", default=[], metavar="NAME=VALUE")
    p.add_argument("--keep", default=None, help="gc: how much to keep, as in `2 GB`")
    p.add_argument("--tiny", action="store_true")
    _place(p)


_LANGUAGE = "effc.runtime.cli_language"
_BUILD = "effc.runtime.cli_build"
_RESULT = "effc.runtime.cli_result"

VERBS = {
    "check": Verb("find every problem of a recipe; reads no model", _LANGUAGE, _check),
    "plan": Verb("predict size, speed, memory and time of every stage; reads no weight", _BUILD, _plan),
    "compile": Verb("run a recipe, or go on with it", _BUILD, _compile),
    "run": Verb("generate text", _RESULT, _sampling),
    "bench": Verb("measure speed, size and loss of a model, or this machine", _RESULT, _bench),
    "show": Verb("print a recipe or a model, a line a node", _RESULT, _show),
    "diff": Verb("compare two recipes or two models", _RESULT, _diff),
    "explain": Verb("say what a code, a method or a stage of an artefact is about", _RESULT, _explain),
    "verify": Verb("check that an artefact or export is what was written", _RESULT, _verify),
    "methods": Verb("list methods and parts", _LANGUAGE, _methods),
    "fmt": Verb("print a recipe in canonical form, as text or YAML", _LANGUAGE, _fmt),
    "schema": Verb("print the JSON schema of recipes, for editors", _LANGUAGE, _schema),
    "cache": Verb("list, explain or clear stored results", "effc.runtime.cache", _cache),
}

if __name__ == "__main__":
    raise SystemExit(main())
