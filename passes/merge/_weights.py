"""The weights of the models in a merge: one each, all 1 unless written."""

from __future__ import annotations

from collections.abc import Sequence

from effc.specs.diagnostic import Diagnostic


def shares(weight: Sequence[float], models: int, normalize: bool = False) -> list[float]:
    """One factor a model, divided by their sum when normalized; a sum of 0 is refused by `wrong_weights`."""
    given = list(weight) or [1.0] * models
    total = sum(given)
    return [w / total for w in given] if normalize and total else given


def wrong_weights(
    kind: str, weight: Sequence[float], models: int, normalize: bool = False
) -> list[Diagnostic]:
    """What is wrong with the weights for this many models."""
    if weight and len(weight) != models:
        return [
            Diagnostic(
                "E452",
                f"`weight` of `{kind}` has {len(weight)} values for {models} models",
                help="write one weight a model, in their order, or leave `weight` out: all count alike",
                about="weight",
            )
        ]
    if normalize and weight and abs(sum(weight)) < 1e-8:
        return [
            Diagnostic(
                "E452",
                f"the weights of `{kind}` sum to {sum(weight):g}, so they cannot be normalized",
                help="use weights with another sum, or write normalize = false",
                about="weight",
            )
        ]
    return []
