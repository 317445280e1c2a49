"""Run a stage that needs nothing but the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effc.compiler.method import Context, Outcome
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Join, Rewrite
from effc.runtime.heap import returning
from effc.runtime.streamed import StreamedRewriter


def rewrite(method: Rewrite, model: Model, context: Context, others: Sequence[Model] = ()) -> Outcome:
    """Edit a clone; `model` is not changed. Methods that stream leave its weights on disk.

    `others` are the further models of a method that joins several.
    """
    if method.streams and context.workdir is not None:
        rw: Rewriter = StreamedRewriter(model, method.kind, context.workdir)
    else:
        rw = Rewriter(model, method.kind)
        rw.model.materialize()
    with returning(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        errors = method.join(rw, others) if isinstance(method, Join) else method.rewrite(rw)
    return Outcome(rw.done(), tuple(rw.log), {"errors": dict(errors)} if errors else {})
