"""Run a stage that needs nothing but the model."""

from __future__ import annotations

import torch

from effc.compiler.method import Context, Outcome
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.runtime.heap import returning
from effc.runtime.streamed import StreamedRewriter


def rewrite(method: Rewrite, model: Model, context: Context) -> Outcome:
    """Edit a clone; `model` is not changed. Methods that stream leave its weights on disk."""
    if method.streams and context.workdir is not None:
        rw: Rewriter = StreamedRewriter(model, method.kind, context.workdir)
    else:
        rw = Rewriter(model, method.kind)
        rw.model.materialize()
    with returning(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        errors = method.rewrite(rw)
    return Outcome(rw.done(), tuple(rw.log), {"errors": dict(errors)} if errors else {})
