"""Streamed rewriting: edits of a model on disk that hold the weights they read and make one at a time.

What a method reads through `present` is gone when the method drops it. What it writes or swaps in goes to a
file at once, in the form of the store, which takes the file over when the stage is published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from effc.compiler.books import Known
from effc.compiler.model import Model
from effc.compiler.presence import loaded
from effc.compiler.rewrite import Rewriter
from effc.compiler.sharing import owned
from effc.compiler.weights import LazyTensor, Stored
from effc.runtime import durable
from effc.runtime.durable import refused
from effc.runtime.peak import trim

TRIM = 4 << 20
"""Bytes read and written between two times that freed memory goes back to the system: the C library keeps
it else, and the temporaries of a matrix are many times its size.
"""


class StreamedRewriter(Rewriter):
    """Edits a model whose weights stay on disk; new ones are spilled to `folder`."""

    def __init__(self, model: Model, origin: str, folder: Path) -> None:
        super().__init__(model, origin)
        self.folder = folder
        self._count = self._passed = 0
        self._real: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        """Spilled tensors that the method still holds, by identity: units that share one stay tied."""
        self._stands: dict[int, Tensor] = {}
        """Identity of a spilled tensor -> what stands for it in the model, on meta."""
        self._sources: Known = {}
        """The same, as the books have it: identity of a stand-in -> (its source, no former name)."""

    def present(self, path: str) -> Any:
        module = loaded(self.model, path, self._moved(path))
        self._pass(sum(t.numel() * t.element_size() for t in module.parameters() if not t.is_meta))
        return module

    def _moved(self, path: str) -> dict[int, LazyTensor]:
        """Sources of the tensors below a path while swaps are not booked yet.

        The first that held a tensor may be gone, so that another name owns it than the model's sources say.
        """
        if self._held is None:
            return {}
        books = self._held | self._sources
        ids = [id(tensor) for _, tensor in owned(self.model.module(path))]
        return {key: books[key][0] for key in ids if key in books and books[key][0] is not None}

    def write(self, path: str, name: str, tensor: Tensor, detail: str = "") -> None:
        super().write(path, name, tensor, detail)
        owner = self.model.ties().get(f"{path}.{name}", f"{path}.{name}")
        self.model.weights[owner] = self._spill(tensor)
        self.model.place(owner, torch.empty_like(tensor, device="meta"))
        self._sources[id(self.model.tensors()[owner])] = (self.model.weights[owner], self._origins.get(owner))

    def swap(self, path: str, new: nn.Module, detail: str = "") -> None:
        for module in new.modules():
            for kind in ("_parameters", "_buffers"):
                slots: dict[str, Any] = getattr(module, kind)
                for name, tensor in slots.items():
                    if tensor is not None and not tensor.is_meta:
                        slots[name] = self._stand_in(tensor)
        super().swap(path, new, detail)

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """Spill a tensor, once, however many units hold it."""
        if self._real.get(id(tensor)) is tensor:
            return self._stands[id(tensor)]
        empty = torch.empty_like(tensor, device="meta")
        stand = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        self._real[id(tensor)], self._stands[id(tensor)] = tensor, stand
        self._sources[id(stand)] = (self._spill(tensor), None)
        return stand

    def _follow(self, known: Known, edit: str = "") -> None:
        self._fresh |= self._sources.keys()
        super()._follow(known | self._sources, edit)

    def _pass(self, count: int) -> None:
        """Book bytes that were read or are written."""
        self._passed += count
        if self._passed >= TRIM:
            self._passed = 0
            trim()

    def _spill(self, tensor: Tensor) -> LazyTensor:
        """Write a tensor to a file of its own; what a stopped run left there is replaced."""
        path = self.folder / f"rewritten-{self._count:06d}.safetensors"
        self._count += 1
        self._pass(tensor.numel() * tensor.element_size())
        try:
            path.unlink(missing_ok=True)  # the store may share the old file
            with path.open("wb") as file:
                durable.write_tensors(file, {durable.ENTRY: tensor})
        except OSError as problem:
            raise refused(problem, path) from problem
        begin = durable.size_of(tensor) - tensor.numel() * tensor.element_size()

        def read() -> Tensor:
            with path.open("rb") as file:
                table, start = durable.read_head(file)
                return durable.read_entry(file, table[durable.ENTRY], start)

        return LazyTensor(tuple(tensor.shape), tensor.dtype, read, Stored(path, begin))
