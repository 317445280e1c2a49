"""What a plan asks of the world: models from disk (headers only), methods, exports, free space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from effc.compiler.around import Text
from effc.compiler.emitted import main_dtype
from effc.compiler.model import Model
from effc.compiler.plan import Staged
from effc.runtime.bind import spec_of, staged
from effc.runtime.data._files import find
from effc.runtime.data.corpus import Corpus, listed_files
from effc.runtime.load import open_model
from effc.runtime.machine import disk_free
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.recipe import Binding, Export, Recipe, refs


class Files:
    """The sources of one recipe; nothing is read but configurations and headers."""

    def __init__(self, recipe: Recipe, store: Path, tiny: bool = False, weights: bool = False) -> None:
        """`weights`: a run follows, so that models without weights are refused."""
        self.recipe, self.store, self.tiny, self.weights = recipe, store, tiny, weights
        self.notices: list[Diagnostic] = []

    def model(self, binding: Binding, models: Mapping[str, Model]) -> Model:
        model = open_model(binding.call, models, self.tiny, planned=not self.weights)
        if not self.weights and not model.weights and binding.call.kind == "load":
            dtype = str(main_dtype(model)).removeprefix("torch.")
            title = f"`{binding.name}` has no weights yet; planned as its config.json says, in {dtype}"
            self.notices.append(Diagnostic("W417", title, severity="warning"))
        return model

    def stage(self, binding: Binding) -> Staged:
        return staged(binding, self.recipe, self._seq(binding))

    def refuses(self, export: Export, model: Model) -> Sequence[Diagnostic]:
        found: Sequence[Diagnostic] = spec_of("export", export.call).refuses(model)
        return found

    def text(self, binding: Binding) -> Text:
        if self.tiny:
            return Text()
        source = spec_of("data", binding.call)
        if isinstance(source, Corpus):
            sizes = [(path.stat().st_size, split) for path, split in listed_files(source.name)]
            return Text(sum(n for n, _ in sizes), sum(n for n, split in sizes if split == "heldout"))
        try:
            whole = sum(path.stat().st_size for path in find(source.path))
        except (EffcError, OSError):  # told by `missing`
            return Text()
        return Text(whole, int(whole * getattr(source, "heldout", 1.0)))

    def missing(self, binding: Binding) -> Sequence[Diagnostic]:
        try:
            if isinstance(path := getattr(spec_of("data", binding.call), "path", None), str):
                find(path)
        except EffcError as problem:
            return [replace(d, about=d.about or "path") for d in problem.diagnostics]
        return ()

    def disk_free(self) -> int:
        return disk_free(self.store)

    def _seq(self, binding: Binding) -> int:
        """Tokens in a sequence of the stage's data, 0 without data."""
        for ref in refs(binding.call.arguments):
            if (source := self.recipe.stage(ref.name)).value == "data":
                return int(getattr(spec_of("data", source.call), "seq", 0))
        return 0
