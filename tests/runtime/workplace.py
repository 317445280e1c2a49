"""A folder with a tokenizer, texts and a recipe, in which a whole recipe runs in about a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from effc.runtime.compiled import Compiled
from effc.runtime.front import parse
from effc.runtime.progress import Event
from effc.runtime.run import compile
from effc.runtime.store import Store

from .doubles import tokenizer_files

RECIPE = """effc 1
recipe t "Everything, small"

param steps = 5
param keep = 2

model base = new(llama, tokenizer = "tok", layers = 4, width = 32, hidden = 64, heads = 4, dtype = fp32)
data  code = text("text/*.txt", seq = 32)

thin  = prune.depth(base, keep = keep, data = code)
heal  = distill.logits(thin, teacher = base, data = code, steps = steps, batch = 2)
small = quantize.gptq(heal, data = code, bits = 4, group = 32, samples = 8)
side  = quantize.rtn(thin, bits = 8, group = 32)

expect small.bytes < base.bytes
"""


class Workplace:
    """Writes recipes and runs them, with every event kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tok").mkdir()
        (folder / "text").mkdir()
        for name, content in tokenizer_files().items():
            (folder / "tok" / name).write_bytes(content)
        for i in range(24):
            lines = (f"def f{i}_{j}(first, second):\n    return first + {j} * second\n" for j in range(12))
            (folder / "text" / f"{i}.txt").write_text("\n\n".join(lines))
        self.store = Store(folder / "store")
        self.events: list[Event] = []

    def run(self, text: str = RECIPE, *settings: str, tiny: bool = False, **more: Any) -> Compiled:
        """Compile a recipe; `self.events` holds what happened."""
        self.events = []
        watch: Callable[[Event], None] = more.pop("watch", lambda event: None)

        def see(event: Event) -> None:
            self.events.append(event)
            watch(event)

        recipe = parse(self.write(text), settings)
        return compile(recipe, Store(self.store.folder), observers=[see], tiny=tiny, **more)

    def write(self, text: str = RECIPE) -> Path:
        path = self.folder / "t.effc"
        path.write_text(text)
        return path

    def names(self, what: str) -> list[str]:
        """Names of the events of one kind."""
        return [event.name for event in self.events if event.what == what]
