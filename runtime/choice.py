"""Choice: which kernels run a model here, and why not others."""

from __future__ import annotations

from dataclasses import dataclass

from effc.compiler.model import Model
from effc.kernels.cpu.isa import Isa, available
from effc.passes.lower.decoder import Unlowered
from effc.runtime.decoder import TRITON, Kernels, device_of, launched, no_program, ready
from effc.specs.diagnostic import Diagnostic, EffcError


@dataclass(frozen=True, slots=True)
class Choice:
    """What `--kernels` and `--isa` come to."""

    kernels: Kernels
    """Never auto."""
    isa: Isa | None
    """Of a C program."""
    why: str = ""
    """Why it is torch where the program was not declined; empty otherwise."""

    @property
    def words(self) -> str:
        """As `effc bench` prints it."""
        if self.isa is not None:
            return f"a C program for {self.isa}"
        if self.kernels in TRITON:
            rows = TRITON[self.kernels]
            of = "" if rows == "bfloat16" else f" over rows of {rows}"
            return f"Triton kernels{of}, a token as one CUDA graph"
        return f"torch: {self.why}" if self.why else "torch"


def choose(model: Model, kernels: Kernels = "auto", isa: str | None = None) -> Choice:
    """auto: the C program, dense weights too, whenever there is one, or Triton kernels where the weights are
    on a GPU; they are made here.

    Raises:
        EffcError: E503 when a program is asked for and there is none, or not for this processor.
    """
    if kernels == "torch":
        return Choice("torch", None)
    if kernels in TRITON or (kernels == "auto" and device_of(model).type == "cuda"):
        try:
            launched(model, TRITON.get(kernels, "bfloat16"))
            return Choice("triton" if kernels == "auto" else kernels, None)
        except Unlowered as reason:
            if kernels in TRITON:
                raise no_program(reason, kernels) from None
            return Choice("torch", None, str(reason))
    chosen = Isa(isa) if isa else available()[0]
    if chosen not in available():
        had = f"it has {', '.join(available())}"
        raise EffcError(
            Diagnostic("E503", f"this processor has no {chosen}", notes=(had,), help="leave out `--isa`")
        )
    try:
        if not hasattr(model.gm, "head"):
            raise Unlowered("it has no head that could write text")
        ready(model, chosen)
    except Unlowered as reason:
        if kernels == "c":
            raise no_program(reason) from None
        return Choice("torch", None, str(reason))
    return Choice("c", chosen)
