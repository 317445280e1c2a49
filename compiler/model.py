"""Model: the block graph, the roles of its modules, and where its weights come from.

Shapes: ids [B, T] int64, attention_mask [B, T] (1 token, 0 padding) -> logits [B, T, V] of a decoder, hidden
states [B, T, D] of an encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from effc.compiler.assemble import module_of
from effc.compiler.blocks import Unit
from effc.compiler.roles import Role, canonical, layer_of
from effc.compiler.sharing import aliases, cloned_graph, cloned_modules, owned, put
from effc.compiler.step import Cache, Phase, Step
from effc.compiler.weights import WeightSource
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.select import Name


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Tokenizer, special tokens, generation settings and chat template, as the files that hold them."""

    files: Mapping[str, bytes] = field(repr=False)
    """File name (tokenizer.json, tokenizer_config.json, ...) -> content."""


class Model(nn.Module):
    """A model between two stages. Its module paths and tensor names are canonical (see `roles`).

    `roles` is the truth about what a module is for; node.meta["origin"] says which stage made a node.
    Parameters may be on the meta device: `materialize` reads them from `weights`. `beside` holds poolers and
    task heads of the source by their names on disk: nothing here computes with them or counts them, and an
    export in the source's layout writes them again.
    """

    generation: ClassVar[Callable[..., Tensor] | None] = None
    """Handed in by the runtime, which owns generation."""

    def __init__(
        self,
        gm: fx.GraphModule,
        roles: Mapping[str, Role] | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        architecture: str = "",
        tokenizer: TokenizerFiles | None = None,
        weights: WeightSource | None = None,
        facts: Mapping[str, Any] | None = None,
        beside: WeightSource | None = None,
    ) -> None:
        super().__init__()
        self.gm = gm
        self.roles: dict[str, Role] = dict(roles) if roles is not None else roles_of(gm)
        self.config: dict[str, Any] = dict(config or {})
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.weights: WeightSource = dict(weights or {})
        self.facts: dict[str, Any] = dict(facts or {})
        self.beside: WeightSource = dict(beside or {})
        self.eval()

    # -- structure

    def module(self, path: str) -> nn.Module:
        """The module at a canonical path. Raises AttributeError when there is none."""
        return self.gm.get_submodule(path)

    def units(self) -> Iterator[tuple[str, Unit]]:
        """Every block and unit with its path, each object once."""
        for path, module in self.gm.named_modules():
            if isinstance(module, Unit):
                yield path, module

    def names(self) -> list[Name]:
        """Every module that has a role, for selectors: by layer, then as the graph has them."""
        return [Name(path, role.name, role.layer) for path, role in self.roles.items()]

    def paths(self, prefix: str = "") -> list[str]:
        """Module paths whose role is within `prefix` (all when empty), by layer, then name."""
        found = [(r.key(), path) for path, r in self.roles.items() if not prefix or r.within(prefix)]
        return [path for _, path in sorted(found)]

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return 1 + max((r.layer for r in self.roles.values() if r.layer is not None), default=-1)

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by canonical name; a tied one under its first name only."""
        return dict(owned(self.gm))

    def ties(self) -> dict[str, str]:
        """Names that share a tensor with another: alias -> owner (the first name)."""
        return aliases(self.gm)

    # -- weights

    @property
    def is_meta(self) -> bool:
        """True while some tensor has no storage."""
        return any(t.is_meta for t in self.tensors().values())

    def materialize(self, prefixes: Iterable[str] | None = None, device: str | None = None) -> Model:
        """Read the tensors below `prefixes` (all when None) from `weights`; those present stay. Returns self.

        Raises:
            EffcError: E410 when a tensor has no source, E411 when its shape or dtype is not the expected one.
        """
        owners = self.tensors()
        for name in _within(owners, prefixes):
            if not owners[name].is_meta:
                continue
            if name not in self.weights:
                raise EffcError(Diagnostic("E410", f"there are no weights for `{name}`"))
            tensor = self.weights[name].read()
            old = owners[name]
            if tensor.shape != old.shape or tensor.dtype != old.dtype:
                note = f"expected {list(old.shape)} {old.dtype}, got {list(tensor.shape)} {tensor.dtype}"
                raise EffcError(Diagnostic("E411", f"`{name}` does not fit its place", notes=(note,)))
            self.place(name, tensor.to(device) if device else tensor)
        return self

    def release(self, prefixes: Iterable[str] | None = None) -> None:
        """Give up the memory of tensors that can be read again from `weights`."""
        owners = self.tensors()
        for name in _within(owners, prefixes):
            if name in self.weights and not owners[name].is_meta:
                self.place(name, torch.empty_like(owners[name], device="meta"))

    def place(self, name: str, tensor: Tensor) -> None:
        """Put a tensor at a name and at every name tied to it; other models keep theirs."""
        owner = self.ties().get(name, name)
        places = [owner, *(alias for alias, to in self.ties().items() if to == owner)]
        put(self.gm, places, tensor)

    def clone(self) -> Model:
        """A model of its own that shares every tensor's storage; ties stay ties. Nothing is copied."""
        gm = module_of(cloned_modules(self.gm), cloned_graph(self.gm.graph))
        return self.like(gm, self.roles)

    def like(self, gm: fx.GraphModule, roles: Mapping[str, Role] | None = None) -> Model:
        """Another graph with this model's config, tokenizer, weights and facts."""
        return Model(
            gm,
            roles,
            config=self.config,
            architecture=self.architecture,
            tokenizer=self.tokenizer,
            weights=self.weights,
            facts=self.facts,
            beside=self.beside,
        )

    # -- running

    def step(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        token_types: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Step:
        """Positions, padding and cache for a call. attention_mask [B, S] covers cached tokens too.

        Positions count real tokens only, so padding on either side changes no logit of a real one
        (an encoder that counts padding says so in its embedding).
        """
        embedding = self.gm.get_submodule("embedding")
        length = int(getattr(embedding, "length", lambda x: x.shape[1])(ids))
        start = cache.filled if cache is not None else 0
        mask = attention_mask.bool() if attention_mask is not None else None
        if mask is not None and bool(mask.all()):
            mask = None
        if segments is not None:
            positions = _restarting(segments)
        elif mask is not None and not getattr(embedding, "count_padding", False):
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start : start + length]
        else:
            places = torch.arange(start, start + length, device=ids.device)
            positions = places.expand(ids.shape[0], length)
        phase: Phase = "train" if cache is None else ("decode" if start else "prefill")
        return Step(positions, segments, mask, token_types, cache, phase)

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        step: Step | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] (hidden states of an encoder). A step, where given, replaces the mask."""
        if step is None:
            step = self.step(ids, attention_mask, token_types=token_types)
        out: Tensor = self.gm(ids, step)
        if step.cache is not None:
            step.cache.filled += step.positions.shape[1]
        return out

    def generate(self, ids: Tensor, **settings: Any) -> Tensor:
        """New tokens after ids [B, T]; the settings are those of `effc.runtime.generate.generate`."""
        if Model.generation is None:
            raise TypeError("generation lives in effc.runtime.generate, which is not imported yet")
        return Model.generation(self, ids, **settings)

    # -- names without the graph's own prefix

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.gm.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return self.gm.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.gm.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.gm.load_state_dict(*args, **kwargs)


def roles_of(gm: fx.GraphModule) -> dict[str, Role]:
    """The role table that canonical paths imply, in graph order."""
    units = [path for path, module in gm.named_modules() if isinstance(module, Unit)]
    found = {path: role for path in units if (role := canonical(path)) and leaf(gm, path)}
    return dict(sorted(found.items(), key=lambda item: _layer_key(item[0])))


def leaf(gm: nn.Module, path: str) -> bool:
    """Does the module hold weights of its own?"""
    module = gm.get_submodule(path)
    return bool(module._parameters or module._buffers)


def _layer_key(path: str) -> int:
    layer = layer_of(path)
    if layer is not None:
        return layer
    return -1 if path.startswith("embedding") else 2**31


def _within(names: Iterable[str], prefixes: Iterable[str] | None) -> list[str]:
    if prefixes is None:
        return list(names)
    wanted = tuple(prefixes)
    return [n for n in names if any(n == p or n.startswith(p + ".") for p in wanted)]


def _restarting(segments: Tensor) -> Tensor:
    """Positions that start anew with each segment [B, T] of a packed row."""
    place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    fresh = torch.ones_like(segments, dtype=torch.bool)
    fresh[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return place - torch.where(fresh, place, 0).cummax(1).values
