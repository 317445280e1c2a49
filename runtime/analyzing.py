"""Run an analysis: it reads a model and says something of it; the model stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effc.compiler.findings import Findings
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.shapes import Analyze
from effc.runtime.heap import returning
from effc.runtime.peak import Peak
from effc.specs.diagnostic import EffcError


@dataclass(frozen=True, slots=True)
class Analyzed:
    """What an analysis said, and what that took."""

    findings: Findings
    peak_bytes: int
    """Largest resident memory meanwhile."""
    seconds: float


def analyze(method: Analyze, model: Model, context: Context) -> Analyzed:
    """Weights are read block by block.

    Raises:
        EffcError: what the method refuses about this model (E3).
    """
    problems = [d for d in method.refuses(model, ()) if d.severity == "error"]
    if problems:
        raise EffcError(*problems)
    with Peak() as peak, returning(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        found = method.analyze(model)
    return Analyzed(found, peak.bytes, peak.seconds)
