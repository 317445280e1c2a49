"""Selects: the recipe words `select`, `except` and `rules`, for methods that touch some modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import ConfigDict, Field, ValidationError

from effc.specs.base import Spec
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.select import Rule, Selector, resolve
from effc.specs.units import Gradient

if TYPE_CHECKING:
    from effc.compiler.model import Model

DEFAULT = ("attention", "mlp", "moe.experts", "moe.shared", "linear")
"""Roles touched when nothing is selected: never embedding, head, router or norm. `linear`: traced modules."""

_NO_MATRIX = (
    "norm", "attention", "scale", "fast", "cell", "moe.channels",
    "embedding.position", "embedding.type", "embedding.class",
)  # fmt: skip
"""Roles that no selecting method touches."""


class Selects(Spec):
    """Mixin: picks modules by selectors; later rules win, and may give a module other arguments."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    overrides: ClassVar[tuple[str, ...]] = ()
    """Own fields that a rule may set for the modules it names."""

    select: tuple[str, ...] = Field(
        default=(), description="modules to touch; default: weights of attention and mlp"
    )
    except_: tuple[str, ...] = Field(default=(), alias="except", description="modules to leave out")
    rules: tuple[Rule, ...] = Field(
        default=(), description="per module: skip, or other arguments; the last one wins"
    )

    def targets(self, model: Model) -> dict[str, Self]:
        """Path -> the method as it applies there, in model order; gradients have become the layer's number.

        Raises:
            EffcError: E226, E231, E232 from the selectors, E211 and E212 from arguments of rules.
        """
        names = [name for name in model.names() if name.role not in _NO_MATRIX]
        select = self.select or [role for role in DEFAULT if Selector.parse(role).match(names)]
        table = resolve(select, self.except_, self.rules, names)
        layer = {name.path: name.layer for name in names}
        layers = model.layers
        return {
            path: self.at(path, given)._in_layer(layer[path], layers)
            for path, given in table.items()
            if given is not None
        }

    def _in_layer(self, layer: int | None, layers: int) -> Self:
        """This method with the numbers that its gradients have in one layer of so many."""
        numbers = {
            name: value.at(layer, layers)
            for name in self.overrides
            if isinstance(value := getattr(self, name), Gradient)
        }
        return self.model_copy(update=numbers) if numbers else self

    def at(self, path: str, given: Mapping[str, Any]) -> Self:
        """This method with the arguments of a rule. Raises EffcError E211 when it takes no such argument."""
        if not given:
            return self
        foreign = [key for key in given if key not in self.overrides]
        if foreign:
            raise EffcError(
                Diagnostic(
                    "E211",
                    f"a rule of `{self.kind}` cannot set `{foreign[0]}`",
                    notes=(f"the rule applies to {path}",),
                    help=f"rules may set: {', '.join(('skip', *self.overrides))}",
                )
            )
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        try:
            return type(self).model_validate({**fields, **given})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            title = (
                f"a rule of `{self.kind}` sets `{first['loc'][0] if first['loc'] else path}` to a wrong value"
            )
            note = f"at {path}: {first['msg'].lower()}"
            raise EffcError(Diagnostic("E212", title, notes=(note,))) from error
