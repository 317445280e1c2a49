"""What a run reads from outside: models from folders, data for a model's tokenizer; their fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from effc.compiler.model import Model
from effc.compiler.placed import placed as placed_in
from effc.runtime import tiny as small
from effc.runtime.bind import spec_of
from effc.runtime.clock import Clock
from effc.runtime.data._several import Several
from effc.runtime.file_hash import hash_of
from effc.runtime.hash_ahead import answer, question
from effc.runtime.load import open_model
from effc.runtime.objects import identity_of
from effc.runtime.remembered import Remembered
from effc.runtime.store import Store, content_of
from effc.specs.diagnostic import Diagnostic, EffcError, Label
from effc.specs.recipe import Binding, Call, Recipe, Ref, refs
from effc.specs.source import Span


class Opening:
    """Opens the models and data of one recipe, each once."""

    def __init__(self, recipe: Recipe, store: Store, tiny: bool) -> None:
        self.recipe, self.store, self.tiny = recipe, store, tiny
        self.remembered = Remembered(store.folder / "measured", store.aside)
        self.warnings: list[Diagnostic] = []
        self.clock = Clock()
        self._data: dict[tuple[str, str], Any] = {}

    def model(self, binding: Binding, models: Mapping[str, Model]) -> tuple[Model, str]:
        """A model from outside, its weights not yet read, and the fingerprint of its content."""
        model = open_model(binding.call, models, self.tiny)
        tensors, files = model.tensors(), cache(self._file)
        return model, content_of(model, lambda name: _print(model, name, tensors[name], files))

    def data(self, name: str, model: Model) -> Any:
        """The data of this name as packed for a model's tokenizer.

        Raises:
            EffcError: E62x; those without a place point at the binding.
        """
        binding = self.recipe.stage(name)
        files = dict(model.tokenizer.files) if model.tokenizer else {}
        key = (name, str(sorted(hash(item) for item in files.items())))
        if key not in self._data:
            where = binding.call.span or binding.span
            with placed(where, binding.call), self.clock.on("data", name):
                source = spec_of("data", binding.call)
                place = self.store.folder
                opened = small.open_data(source, files, place) if self.tiny else source.open(files, place)
            self._data[key] = opened
            self.warnings += [w for w in getattr(opened, "notices", ()) if w not in self.warnings]
        return self._data[key]

    def data_of(self, binding: Binding, model: Model) -> dict[str, Any]:
        """Argument -> opened data, for every argument of a stage that names data."""
        found: dict[str, Any] = {}
        for key, value in binding.call.arguments.items():
            named = [ref for ref in refs(value) if self._is(ref, "data")]
            if isinstance(value, Ref) and named:
                found[key] = self.data(value.name, model)
            elif named:
                opened = [self.data(ref.name, model) for ref in named]
                where = binding.call.spans.get(key) or binding.call.span
                with placed(where, binding.call):
                    found[key] = Several([ref.name for ref in named], opened, [ref.split for ref in named])
        return found

    def models_of(self, binding: Binding, models: Mapping[str, Model]) -> dict[str, Model]:
        """Argument -> model, for every argument of a stage that names a model."""
        named = {k: v for k, v in binding.call.arguments.items() if isinstance(v, Ref)}
        return {k: models[v.name] for k, v in named.items() if self._is(v, "model")}

    def names_within(self, binding: Binding) -> Iterable[Ref]:
        """Everything that the arguments of a stage name, at any depth."""
        return refs(binding.call.arguments)

    def _is(self, ref: Ref, value: str) -> bool:
        return self.recipe.stage(ref.name).value == value

    def _file(self, path: Path) -> str:
        """BLAKE3 of a file, remembered by path, size, time of change and inode."""
        about = question(path)
        return str(self.remembered.get(about, lambda: answer(about) or hash_of(path)))


def _print(model: Model, name: str, tensor: Tensor, file: Callable[[Path], str]) -> str:
    """The fingerprint of one tensor; where a file holds it as it is, that of the file and the place."""
    if not tensor.is_meta:
        return identity_of(tensor)
    lazy = model.weights[name]
    if lazy.stored is None:
        return identity_of(lazy.read())
    return f"{file(lazy.stored.file)} {lazy.stored.offset} {list(lazy.shape)} {lazy.dtype}"


@contextmanager
def placed(span: Span | None, call: Call | None = None) -> Iterator[None]:
    """Let diagnostics that know no place point at the argument of the call that they name, or else here."""
    try:
        yield
    except EffcError as error:
        raise EffcError(*(_pointing(d, span, call) for d in error.diagnostics)) from error


def _pointing(diagnostic: Diagnostic, span: Span | None, call: Call | None) -> Diagnostic:
    told = diagnostic if call is None or not diagnostic.about else placed_in(diagnostic, call)
    return told if told.labels or span is None else replace(told, labels=(Label(span),))
