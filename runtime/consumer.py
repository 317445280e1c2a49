"""Ask the real consumer of an export, in a fresh process, what it computes from the written files.

`ask` starts `python -m effc.runtime.consumer JOB` in an empty folder, without network, and reads its answer
back through safetensors and JSON. The child loads the files as any user would (`from_pretrained`,
`PeftModel`, `llama_cpp.Llama`), knows nothing of effc's models, and dies with its parent.

Shapes: B rows, T tokens, V vocabulary, D width, N new tokens.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from effc.specs.diagnostic import Diagnostic, EffcError

NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "transformers": ("hf", ("transformers",)),
    "peft": ("hf", ("transformers", "peft")),
    "compressed_tensors": ("hf", ("transformers", "compressed_tensors")),
    "llama_cpp": ("gguf", ("llama_cpp",)),
    "effc": ("hf", ("effc",)),
}
"""Consumer -> (the extra that installs it, the modules it imports)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the consumer computed."""

    logits: Tensor
    """[B, T, V] float32; hidden states [B, T, D] of an encoder"""
    greedy: Tensor
    """[B, N] int64"""
    version: str
    """name and version of the consumer"""


def need(consumer: str) -> None:
    """Refuse at once when the consumer is not installed, before any work is done.

    Raises:
        EffcError: E550, with the command that installs it.
    """
    extra, modules = NEEDS[consumer]
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise EffcError(
            Diagnostic(
                "E550",
                f"the export cannot be verified without {names}",
                notes=("an export is published only after its real consumer has loaded it",),
                help=f"pip install 'effc[{extra}]'",
            )
        )


def ask(
    consumer: str,
    folder: Path,
    inputs: Tensor,
    mask: Tensor | None = None,
    *,
    base: Path | None = None,
    new_tokens: int = 0,
    timeout: float = 900.0,
) -> Answer:
    """Load `folder` with the consumer in a fresh process and run it on `inputs`.

    Args:
        consumer: a key of `NEEDS`.
        folder: a Hugging Face folder, a PEFT adapter folder (then `base` holds its model), or a .gguf file.
        inputs: ids [B, T] int64, or pixel values [B, C, H, W] float.
        mask: [B, T], 1 where a token is real.
        new_tokens: greedy tokens to generate after each row (0: none).
        timeout: seconds after which the child is ended.

    Raises:
        EffcError: E550 when the consumer is not installed, E551 when it cannot load or run the files.
    """
    need(consumer)
    with tempfile.TemporaryDirectory(prefix="effc-consumer-") as work:
        job = Path(work)
        given = {"inputs": inputs.contiguous()}
        if mask is not None:
            given["mask"] = mask.contiguous()
        save_file(given, job / "question.safetensors")
        question = {
            "consumer": consumer,
            "folder": str(folder.resolve()),
            "base": str(base.resolve()) if base else None,
            "new_tokens": new_tokens,
            "threads": torch.get_num_threads(),
            "parent": os.getpid(),
        }
        (job / "question.json").write_text(json.dumps(question))
        said = _run(job, timeout)
        told = job / "answer.json"
        if not told.exists():
            _failed(consumer, folder, said or ["the process ended without an answer"])
        answer = json.loads(told.read_text())
        if answer["problem"]:
            _failed(consumer, folder, [answer["problem"]])
        tensors = load_file(job / "answer.safetensors")
        return Answer(tensors["logits"], tensors["greedy"], answer["version"])


def _run(job: Path, timeout: float) -> list[str]:
    """Run the child; its last words when it fails. `-P` keeps the working folder off its path."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-P", "-m", "effc.runtime.consumer", str(job)]
    try:
        done = subprocess.run(
            command,
            cwd=job,
            env={**os.environ, **quiet},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return [f"no answer within {timeout:.0f} s"]
    if done.returncode < 0:
        return [f"the process was ended by signal {-done.returncode}", *done.stderr.strip().splitlines()[-2:]]
    return [] if done.returncode == 0 else done.stderr.strip().splitlines()[-3:]


def _failed(consumer: str, folder: Path, why: list[str]) -> None:
    raise EffcError(
        Diagnostic(
            "E551",
            f"`{consumer}` does not load or run what was written to {folder.name}",
            notes=tuple(why),
            help="nothing was published; `effc verify` tells whether the model is sound without it",
        )
    )


# ---- the child ----


def _main(job: Path) -> None:
    question = json.loads((job / "question.json").read_text())
    threading.Thread(target=_die_with, args=(question["parent"],), daemon=True).start()
    torch.set_num_threads(question["threads"])
    given = load_file(job / "question.safetensors")
    answer: dict[str, Any] = {"problem": None, "version": ""}
    try:
        load = {"llama_cpp": _llama_cpp, "effc": _effc}.get(question["consumer"], _transformers)
        with torch.no_grad():
            logits, greedy, answer["version"] = load(question, given["inputs"], given.get("mask"))
        save_file({"logits": logits.contiguous(), "greedy": greedy.contiguous()}, job / "answer.safetensors")
    except Exception as error:  # whatever the consumer raises is its verdict on the files
        answer["problem"] = f"{type(error).__name__}: {error}"
    (job / "answer.json").write_text(json.dumps(answer))


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _transformers(
    question: dict[str, Any], inputs: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, str]:
    import transformers

    home = question["base"] or question["folder"]
    config = transformers.AutoConfig.from_pretrained(home, trust_remote_code=False)
    names = config.architectures or [""]
    decoder = names[0].endswith(("ForCausalLM", "LMHeadModel"))
    family: Any = transformers.AutoModelForCausalLM if decoder else transformers.AutoModel
    model, info = family.from_pretrained(
        home, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    version = f"transformers {transformers.__version__}"
    _complete(info, decoder)
    if question["base"]:
        import peft

        model = peft.PeftModel.from_pretrained(model, question["folder"])
        version = f"peft {peft.__version__}"
    model.eval()
    if inputs.is_floating_point():
        return (
            model(pixel_values=inputs).last_hidden_state.float(),
            torch.zeros(0, dtype=torch.int64),
            version,
        )
    if not decoder:
        hidden = model(input_ids=inputs, attention_mask=mask).last_hidden_state
        return hidden.float(), torch.zeros(0, dtype=torch.int64), version
    logits = model(input_ids=inputs, attention_mask=mask).logits.float()
    return logits, _greedy(model, inputs, question["new_tokens"]), version


def _complete(info: dict[str, Any], decoder: bool) -> None:
    """A consumer that fills gaps with random weights has not loaded the model (a pooler aside)."""
    missing = [name for name in info.get("missing_keys", ()) if "pooler" not in name]
    extra = list(info.get("unexpected_keys", ())) if decoder else []
    wrong = [str(item) for item in info.get("mismatched_keys", ())]
    for word, names in (("lacks", missing), ("does not know", extra), ("has other shapes for", wrong)):
        if names:
            raise ValueError(f"the loader {word} {len(names)} tensors, such as {sorted(names)[0]}")


def _greedy(model: Any, ids: Tensor, count: int) -> Tensor:
    """Greedy continuation of unpadded rows, with the consumer's own cache -> [B, N]"""
    chosen: list[Tensor] = []
    past = None
    step = ids
    for _ in range(count):
        out = model(input_ids=step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        step = out.logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(step)
    return torch.cat(chosen, 1) if chosen else torch.zeros(len(ids), 0, dtype=torch.int64)


def _llama_cpp(question: dict[str, Any], inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, str]:
    import llama_cpp

    count = question["new_tokens"]
    length = inputs.shape[1]
    _without_repacking(llama_cpp.llama_cpp)
    model = llama_cpp.Llama(
        model_path=question["folder"],
        n_ctx=length + count,
        n_batch=length + count,
        n_threads=question["threads"],
        n_threads_batch=question["threads"],
        logits_all=True,
        verbose=False,
    )
    logits, greedy = [], []
    for row in inputs.tolist():
        model.reset()
        model.eval(row)
        logits.append(torch.from_numpy(model.scores[:length].copy()))
        said: list[int] = []
        for place in range(length, length + count):
            said.append(int(model.scores[place - 1].argmax()))
            if len(said) < count:
                model.eval(said[-1:])
        greedy.append(said)
    version = f"llama-cpp-python {llama_cpp.__version__}"
    return (
        torch.stack(logits).float(),
        torch.tensor(greedy, dtype=torch.int64).reshape(len(inputs), count),
        version,
    )


def _without_repacking(library: Any) -> None:
    """Use the weights as the file has them: llama.cpp's repacking AMX kernels crash on some machines."""
    default = library.llama_model_default_params

    def plain() -> Any:
        parameters = default()
        parameters.use_extra_bufts = False
        return parameters

    library.llama_model_default_params = plain


def _effc(question: dict[str, Any], inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, str]:
    """An artefact's consumer is effc itself, started anew."""
    from importlib.metadata import version

    from effc.runtime.load import load

    model = load(question["folder"]).materialize()
    logits = model(inputs, attention_mask=mask).float()
    return logits, torch.zeros(len(inputs), 0, dtype=torch.int64), f"effc {version('effc')}"


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
