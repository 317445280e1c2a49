"""The one training loop. Methods own losses, parts own optimizer and schedule, data owns batches.

Weights and optimizer state are float32 and move in float32; the passes may run in bfloat16 on a copy.
Everything random is counted, not drawn in turn: the sequences of step s depend on the seed and s alone, so a
training that goes on from a checkpoint ends with the same bits as one that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from effc.compiler.auxiliary import after_step
from effc.compiler.losses import IGNORED
from effc.compiler.method import Batch, Context, Data, Outcome, Schedule
from effc.compiler.model import Model
from effc.compiler.rewrite import Edit, Rewriter
from effc.compiler.shapes import Train
from effc.runtime.curve import Curve
from effc.runtime.data._several import split_of
from effc.runtime.heap import keeping
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.parts.train.schedule.cosine import Cosine
from effc.runtime.precision import working_dtype
from effc.runtime.training_state import Checkpoints, Moving
from effc.specs.diagnostic import Diagnostic, EffcError


def fit(method: Train, model: Model, context: Context) -> Outcome:
    """Run a training stage; `model` and the teachers are not changed.

    Raises:
        EffcError: E650 when nothing would move or there is no sequence to train on, E651 when the loss stops
            being a number.
        KeyboardInterrupt: when the context asks to stop; a checkpoint is saved before.
    """
    rw = Rewriter(model, method.kind)
    method.prepare(rw, list(context.models.values()))
    method.begin(rw, context.seed)
    rw.model.materialize()
    training = _Training(method, rw, context, model)
    with torch.random.fork_rng(devices=[]), keeping():
        training.run()
    return training.outcome()


class _Training:
    """One run of the loop: the student that computes, the float32 weights that move, and what drives them."""

    def __init__(self, method: Train, rw: Rewriter, context: Context, before: Model) -> None:
        self.method, self.rw, self.context = method, rw, context
        self.data: Data = context.data["data"]
        self.split = split_of(method)
        self._refuse()
        self._order: tuple[int, np.ndarray[Any, Any]] = (-1, np.empty(0))
        dtype = working_dtype(method.precision, context.device, context.precision)
        self.student = _copy(rw.model, dtype, context.device)
        models = {name: _copy(m, dtype, context.device) for name, m in context.models.items()}
        if method.remembers:
            models["before"] = _copy(before, dtype, context.device)
        self.teachers = method.teach(models, self._all(), context)
        self.moving = self._moving()
        optimizer = method.optimizer or (AdamW() if method.rate is None else AdamW(lr=method.rate))
        self.schedule: Schedule = method.schedule or Cosine()
        self.optimizer = optimizer.build(list(self.moving.masters.items()))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.curve = Curve(method.steps)

    def run(self) -> None:
        """All steps that are not in the journal yet."""
        checkpoints = Checkpoints(self.context.journal, self.moving, self.optimizer, self.curve)
        start = checkpoints.restore()
        self.moving.publish()
        for step in range(start, self.method.steps):
            self.curve.add(step, self._step(step))
            done = step + 1
            self.context.progress(done, self.method.steps, "steps")
            stop = self.context.stop() and done < self.method.steps
            checkpoints.offer(done, force=stop)
            if stop:
                raise KeyboardInterrupt

    def outcome(self) -> Outcome:
        """The student's weights in the dtypes they came in."""
        for name, master in self.moving.masters.items():
            path, _, slot = name.rpartition(".")
            dtype = self.rw.model.tensors()[name].dtype
            self.rw.write(path, slot, master.detach().to("cpu", dtype))
        self.rw.model.facts["learned"] = True
        first, last = self.curve.ends()
        self.rw.log.append(Edit("train", "*", f"{self.method.steps} steps, loss {first:.4f} -> {last:.4f}"))
        seen = self.method.steps * self.method.batch
        measures = {"steps": self.method.steps, "sequences": seen, "curve": self.curve.as_json()}
        if scores := dict(self.method.finish(self.rw)):
            measures["scores"] = scores
        model = self.rw.done()
        with torch.no_grad():
            measures |= self.method.measure(model, self.data)
        return Outcome(model, tuple(self.rw.log), measures)

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns the loss terms of its sequences."""
        torch.manual_seed(_number(self.context.seed, 1, step))
        rate = self.schedule.rate(step, self.method.steps)
        for group, full in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = full * rate
        losses: dict[str, float] = {}
        tally: dict[str, torch.Tensor] = {}
        of = self.method.steps
        parts = [replace(self._moved(b), tally=tally, at=step, of=of) for b in self._batches(step)]
        counts = [int((b.labels != IGNORED).sum()) for b in parts]
        for batch, count in zip(parts, counts, strict=True):
            share = count / max(1, sum(counts))
            found = self.method.loss(self.student, self.teachers, batch)
            (found["total"] * share).backward()
            self.moving.collect()
            for name, value in found.items():
                losses[name] = losses.get(name, 0.0) + float(value.detach()) * share
        norm = self.moving.clip(self.method.clip)
        if not (math.isfinite(losses["total"]) and math.isfinite(norm)):
            raise _diverged(self.method.kind, step, losses["total"], norm, self.rates[0] * rate)
        self.optimizer.step()
        after_step(self.student, self.moving.masters, (step + 1) / self.method.steps)
        self.moving.publish()
        return losses

    def _all(self) -> Iterator[Batch]:
        """Every sequence that some step will see, each once, in the order of the data."""
        rows = sorted({self._row(i) for i in range(self.method.steps * self.method.batch)})
        for start in range(0, len(rows), self.method.batch):
            yield self._moved(self.data.batch(self.split, rows[start : start + self.method.batch]))

    def _batches(self, step: int) -> Iterator[Batch]:
        """The sequences of a step, in parts."""
        rows = [self._row(step * self.method.batch + i) for i in range(self.method.batch)]
        size = -(-len(rows) // self.method.accumulate)
        for start in range(0, len(rows), size):
            yield self.data.batch(self.split, rows[start : start + size])

    def _row(self, number: int) -> int:
        """The sequence that is seen as the `number`th; every pass has its own order and cuts."""
        size = self.data.size(self.split)
        epoch, place = divmod(number, size)
        if self._order[0] != epoch:
            random = np.random.Generator(np.random.Philox(_number(self.context.seed, 0, epoch)))
            self._order = (epoch, random.permutation(size))
        return int(self._order[1][place]) + (epoch * size if self.method.recuts else 0)

    def _moved(self, batch: Batch) -> Batch:
        device = self.context.device
        if device.type == "cpu":
            return batch
        segments = batch.step.segments
        step = replace(
            batch.step,
            positions=batch.step.positions.to(device),
            segments=None if segments is None else segments.to(device),
            memo={},
        )
        return Batch(batch.ids.to(device), batch.labels.to(device), step)

    def _moving(self) -> Moving:
        """The parameters that train, by name."""
        names = list(dict.fromkeys(self.method.trains(self.student)))
        shared = dict(self.student.named_parameters())
        for name in names:  # the clone shares storage with the model that came in
            self.student.place(name, shared[name].detach().clone())
        present = dict(self.student.named_parameters())
        chosen = {name: present[name] for name in names}
        if not chosen:
            note = f"the model has {len(present)} parameters, none of them is chosen"
            raise EffcError(
                Diagnostic(
                    "E650",
                    f"`{self.method.kind}` would train nothing",
                    notes=(note,),
                    help="choose some in `train`",
                )
            )
        exact = self.rw.model.tensors()
        return Moving(chosen, {name: exact[name] for name in chosen})

    def _refuse(self) -> None:
        """What the data alone makes impossible."""
        if self.data.size(self.split) == 0 or self.data.tokens(self.split) == 0:
            raise EffcError(
                Diagnostic(
                    "E650",
                    f"there is no token to train on in the split `{self.split}`",
                    help="give more text",
                )
            )


def _copy(model: Model, dtype: torch.dtype, device: torch.device) -> Model:
    """A clone whose floating parameters are in the working dtype; packed buffers stay as they are, and batch
    norms, whose statistics are buffers of one dtype with their gains.
    """
    out = model.clone().materialize()
    norms = [path for path, m in out.gm.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for name, parameter in list(out.named_parameters()):
        if name.rpartition(".")[0] in norms:
            out.place(name, parameter.detach().to(device))
            continue
        out.place(name, parameter.detach().to(device, dtype if parameter.is_floating_point() else None))
    for name, buffer in list(out.named_buffers()):
        if buffer.device != device:
            out.place(name, buffer.to(device))
    return out


def _number(seed: int, purpose: int, counter: int) -> int:
    """A 63-bit number from a seed and a counter."""
    return int(
        np.random.SeedSequence([seed & (2**63 - 1), purpose, counter]).generate_state(1, np.uint64)[0] >> 1
    )


def _diverged(kind: str, step: int, loss: float, norm: float, rate: float) -> EffcError:
    note = f"loss {loss:g}, norm of the gradient {norm:g}, learning rate {rate:g}"
    return EffcError(
        Diagnostic(
            "E651",
            f"the loss of `{kind}` is no longer a number at step {step + 1}",
            notes=(note,),
            help=f"lower the learning rate, e.g. to {rate / 10:.1g}, or lengthen the warmup",
        )
    )
