"""Common checks that run a method on a tiny decoder, for methods that decoders are not for."""

from __future__ import annotations

from collections.abc import Mapping

_CHECKS = (
    "leaves_its_input_alone",
    "logs_what_it_did",
    "keeps_its_contract",
    "predicts_its_cost_exactly",
    "estimates_its_work_without_weights",
    "roles_stay_true",
    "saved_model_loads_equal",
    "same_seed_gives_the_same_numbers",
)


def on_a_decoder(reason: str) -> Mapping[str, str]:
    """Each of them -> why it does not apply, and which tests stand in for it."""
    return dict.fromkeys(_CHECKS, reason)
