"""Commands about finished models: run, bench, show, diff, verify, explain. Each reads, measures, prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effc.specs.diagnostic import Diagnostic, EffcError

if TYPE_CHECKING:
    from effc.compiler.model import Model
    from effc.runtime.choice import Choice

RECIPES = (".effc", ".yaml", ".yml")


def run(options: argparse.Namespace) -> int:
    """Generate after each prompt; prompts of a file run as one batch."""
    from effc.runtime.prompting import complete

    prompts = list(options.prompt)
    if options.prompts is not None:
        prompts += [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line]
    if not prompts:
        raise EffcError(
            Diagnostic("E680", "there is no prompt", help='write --prompt "def add(" or --prompts FILE')
        )
    model = _model(options.model, options.device)
    choice = _choice(model, options)
    texts = complete(
        model,
        prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k or 0,
        top_p=1.0 if options.top_p is None else options.top_p,
        seed=options.seed,
        kernels=choice.kernels,
        isa=choice.isa,
    )
    if options.json:
        _print_json([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)])
    else:
        print("\n---\n".join(p + t for p, t in zip(prompts, texts, strict=True)))
    return 0


def bench(options: argparse.Namespace) -> int:
    """Measure this machine, or a model on it."""
    if options.calibrate:
        from effc.runtime.machine import calibrate, calibrated_path

        target = calibrate(options.device or "cpu")
        if options.json:
            _print_json(target.model_dump(mode="json"))
        else:
            import yaml

            print(yaml.safe_dump(target.model_dump(mode="json"), sort_keys=False).rstrip())
            print(f"written to {calibrated_path(options.device or 'cpu')}", file=sys.stderr)
        return 0
    if options.model is None:
        raise EffcError(
            Diagnostic("E680", "there is nothing to measure", help="name a model, or write --calibrate")
        )
    from effc.runtime.bench import bench as measured
    from effc.runtime.bench import bench_text

    model = _model(options.model, options.device)
    choice = _choice(model, options)
    size = (options.prompt_tokens, options.max_new_tokens, options.batch)
    record = measured(model, *size, _data(model, options.data), choice)
    text = bench_text(record)
    if options.against is not None:
        from effc.runtime.against import against, against_text

        record["against"] = against(model, *size, choice)
        text += f"\n{against_text(record['against'])}"
    if options.json:
        _print_json({"model": options.model, **record})
    else:
        print(text)
    return 0


def show(options: argparse.Namespace) -> int:
    """A recipe as it is understood, or a model, a line a node."""
    if _is_recipe(options.what):
        from effc.runtime.cli_language import fmt

        return fmt(
            argparse.Namespace(
                recipe=Path(options.what), to=None, write=False, check=False, json=options.json
            )
        )
    from effc.compiler.show import rows
    from effc.compiler.show import show as text

    model = _model(options.what, None, weights=False)
    if options.json:
        from dataclasses import asdict

        _print_json([asdict(row) for row in rows(model)])
    else:
        print(text(model))
    return 0


def diff(options: argparse.Namespace) -> int:
    """Exit code 0 whether or not there is a difference, as it is no problem in the input."""
    from effc.runtime.diff import diff_models, diff_recipes, diff_text

    if _is_recipe(options.left) != _is_recipe(options.right):
        raise EffcError(
            Diagnostic(
                "E681",
                "a recipe cannot be compared with a model",
                notes=(f"`{options.left}` and `{options.right}`",),
                help="give two recipes, or two models",
            )
        )
    if _is_recipe(options.left):
        lines = diff_recipes(
            _canonical(options.left), _canonical(options.right), (options.left, options.right)
        )
        if options.json:
            _print_json({"kind": "recipe", "lines": lines})
        else:
            print("\n".join(lines) if lines else "the recipes mean the same")
        return 0
    left, right = (_model(where, None, weights=False) for where in (options.left, options.right))
    record = diff_models(left, right, options.tensors)
    if options.json:
        _print_json(record)
    else:
        print(diff_text(record))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Exit code 3 when the artefact is not what its lock says."""
    from effc.runtime.verify import verify as checked
    from effc.runtime.verify import verify_text

    record = checked(options.artefact, deep=options.deep)
    if options.json:
        _print_json(record)
    else:
        print(verify_text(record))
    return 0 if record["holds"] else 3


def explain(options: argparse.Namespace) -> int:
    """A stage of an artefact; codes and methods belong to the language."""
    if Path(options.what).is_dir():
        from effc.runtime.decoder import TRITON
        from effc.runtime.story import explained, explained_text

        record = explained(Path(options.what), options.stage, TRITON.get(options.kernels))
        if options.json:
            _print_json(record)
        else:
            print(explained_text(record))
        return 0
    from effc.runtime import cli_language

    return int(cli_language.explain(options))


def _model(where: str, device: str | None, weights: bool = True) -> Model:
    from effc.runtime.load import load

    model = load(where)
    return model.materialize(device=device) if weights else model


def _choice(model: Model, options: argparse.Namespace) -> Choice:
    """The kernels that run the model; where they are torch's unasked, stderr says why."""
    from effc.runtime.choice import choose

    choice = choose(model, options.kernels, options.isa)
    if choice.why:
        print(f"effc: the model runs in torch: {choice.why}", file=sys.stderr)
    for words in _kept_kernels(model, Path(options.model)) if choice.kernels == "c" else ():
        print(f"effc: {words}; what runs is emitted here", file=sys.stderr)
    return choice


def _kept_kernels(model: Model, folder: Path) -> list[str]:
    """How the kernels that an artefact keeps for reading differ from those that run."""
    from effc.runtime import artifact
    from effc.runtime.kernel_texts import differences

    if not artifact.is_artifact(folder):
        return []
    told = artifact.story(folder)
    return differences(told.kernels, told.lock.get("kernels"), model)


def _data(model: Model, name: str) -> Any:
    """Held-out text for the model's own tokenizer: a corpus by name, or files; None without a tokenizer."""
    if model.tokenizer is None:
        return None
    from effc.runtime.data.corpus import Corpus
    from effc.runtime.data.text import Text

    source = Text(path=name) if Path(name).exists() else Corpus.model_validate({"name": name})
    return source.open(model.tokenizer.files)


def _is_recipe(what: str) -> bool:
    return Path(what).suffix in RECIPES and Path(what).is_file()


def _canonical(path: str) -> str:
    from effc.dsl.resolved import text_of
    from effc.runtime.catalogue import catalogue
    from effc.runtime.front import parse

    return text_of(parse(path), catalogue())


def _print_json(value: dict[str, Any] | Sequence[Any]) -> None:
    print(json.dumps(value, indent=2))
