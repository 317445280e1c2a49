"""Text in, text out: encode prompts with the model's own tokenizer, generate as one batch, decode."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effc.compiler.model import Model
from effc.kernels.cpu.isa import Isa
from effc.runtime.data._vocabulary import Vocabulary
from effc.runtime.decoder import Kernels
from effc.runtime.generate import generate
from effc.specs.diagnostic import Diagnostic, EffcError


def complete(
    model: Model,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    kernels: Kernels = "auto",
    isa: Isa | None = None,
) -> list[str]:
    """What the model writes after each prompt, without the prompt.

    Raises:
        EffcError: E625 without a tokenizer, E682 for an encoder, and what `generate` refuses.
    """
    if not hasattr(model.gm, "head"):
        raise EffcError(Diagnostic("E682", "the model has no head that could write text"))
    vocabulary = Vocabulary.of(model.tokenizer.files if model.tokenizer else {})
    rows = [[*vocabulary.before, *ids.tolist()] for ids in vocabulary.encode(list(prompts))]
    longest = max(len(row) for row in rows)
    device = next(iter(model.tensors().values())).device
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    ends = tuple(vocabulary.after)
    out = generate(
        model,
        ids,
        mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos=ends,
        pad=ends[0] if ends else 0,
        kernels=kernels,
        isa=isa,
    )
    return [_decoded(vocabulary, row[longest:].tolist(), ends) for row in out]


def _decoded(vocabulary: Vocabulary, new: list[int], ends: Sequence[int]) -> str:
    stop = next((i for i, token in enumerate(new) if token in ends), len(new))
    return str(vocabulary.tokenizer.decode(new[:stop]))
