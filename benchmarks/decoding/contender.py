"""One contender of benchmarks/decode.py, a process of its own: loads a model, then times what it is asked.

    PYTHON contender.py NAME FOLDER THREADS

Says "@ {...}" once it is ready: its version, and what more there is to know. Then every line
`batch prompt new` on stdin is one run, answered by a line "@ {...}" with the seconds of `prefill` and of a
`step`, and the processor seconds (`work`) of a step. The line `loss` is answered by the mean surprise, in
nats a token, of the sequences in FOLDER.held.json, read token by token as a decoder reads. NAME is one of
CONTENDERS and its setting, as in `effc:4`; FOLDER has the layout of Hugging Face, and beside it lie
FOLDER.q4_0.gguf and FOLDER.q8_0.gguf. `last` of a contender holds the last logits [B, V].
Imports nothing that its contender does not need.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

Ids = list[list[int]]


class Effc:
    """The generated C program. Setting: float32, bfloat16, or bits (groups of 64, or as 4g32; head of 8).

    4 bits in groups of 64 have zero codes: of the grids that were tried on zoo:pylm (rounded, with and
    without zero codes, ranges whole or fitted, groups of 32 and 64; GPTQ), this one loses least below the
    5.03 bits of Q4_0, and less than that.
    """

    def __init__(self, setting: str, folder: str, threads: int) -> None:
        import torch

        from effc.compiler.rewrite import Rewriter
        from effc.passes.quantize.rtn import RTN
        from effc.runtime.bench import bytes_per_token
        from effc.runtime.decoder import ProgramDecoder, ready
        from effc.runtime.load import load

        torch.set_num_threads(threads)
        model = load(folder, dtype={"float32": "fp32", "bfloat16": "bf16"}.get(setting)).materialize()
        bits, _, group = setting.partition("g")
        if bits.isdigit():
            rewriter = Rewriter(model)
            head = {"on": "head", "bits": 8, "scheme": "symmetric"}
            grid = {"bits": int(bits), "group": int(group or 64), "rules": [head]}
            grid["scheme"] = "asymmetric" if setting == "4" else "symmetric"
            RTN.model_validate(grid).rewrite(rewriter)
            model = rewriter.done()
        self.ready, self.decoder = ready(model, None, threads), ProgramDecoder
        self.vocab = self.ready.lowered.plan.vocab
        self.about = {"bytes": bytes_per_token(self.ready)}
        self.last: Any = None

    def prefill(self, ids: Ids, longest: int) -> Any:
        import torch

        self.engine = self.decoder(self.ready, len(ids), longest)
        self.last = self.engine.prefill(torch.tensor(ids), None)
        return self.engine.likeliest()

    def step(self, tokens: Any) -> Any:
        self.last = self.engine.next(tokens)
        return self.engine.likeliest()


class Transformers:
    """Eager transformers. Setting: float32, bfloat16, or int8 for torch's dynamic quantization."""

    def __init__(self, setting: str, folder: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        dtype = torch.bfloat16 if setting == "bfloat16" else torch.float32
        self.model: Any = self.load(transformers, setting, folder, dtype).eval()
        self.vocab = self.model.config.vocab_size
        self.about: dict[str, Any] = {"version": f"transformers {transformers.__version__}"}
        if setting in ("float32", "bfloat16"):
            read = {id(m.weight): m.weight for m in self.model.modules() if isinstance(m, torch.nn.Linear)}
            self.about["bytes"] = sum(w.numel() * w.element_size() for w in read.values())
        self.last: Any = None

    def load(self, transformers: Any, setting: str, folder: str, dtype: Any) -> Any:
        import torch

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if setting == "int8":
            model = torch.ao.quantization.quantize_dynamic(model.eval(), {torch.nn.Linear})
        return model

    def prefill(self, ids: Ids, longest: int) -> Any:
        import torch

        self.past: Any = None
        return self.step(torch.tensor(ids))

    def step(self, tokens: Any) -> Any:
        tokens = tokens[:, None] if tokens.ndim == 1 else tokens
        out = self.model(input_ids=tokens, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        self.last = out.logits[:, -1]
        return self.last.argmax(-1)


class Torchao(Transformers):
    """Setting: int8 or int4 (weights alone), or dynamic8."""

    def load(self, transformers: Any, setting: str, folder: str, dtype: Any) -> Any:
        ao: Any = import_module("torchao.quantization")
        model = super().load(transformers, "", folder, dtype)
        forms = {
            "int8": "Int8WeightOnlyConfig",
            "int4": "Int4WeightOnlyConfig",
            "dynamic8": "Int8DynamicActivationInt8WeightConfig",
        }
        ao.quantize_(model, getattr(ao, forms[setting])())
        return model


class Bitsandbytes(Transformers):
    """Setting: nf4 or llm8."""

    def load(self, transformers: Any, setting: str, folder: str, dtype: Any) -> Any:
        four = setting == "nf4"
        given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if four else {"load_in_8bit": True}
        config = transformers.BitsAndBytesConfig(**given)
        auto = transformers.AutoModelForCausalLM
        return auto.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map="cpu")


class Hqq(Transformers):
    """Setting: 4 or 8 bits, groups of 64. By hqq itself, all linears but the head."""

    def load(self, transformers: Any, setting: str, folder: str, dtype: Any) -> Any:
        import torch

        hqq: Any = import_module("hqq.core.quantize")
        config = hqq.BaseQuantizeConfig(nbits=int(setting), group_size=64)
        model = super().load(transformers, "", folder, dtype)
        for parent in list(model.model.modules()):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    packed = hqq.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
                    setattr(parent, name, packed)
        return model


class Quanto(Transformers):
    """Setting: qint8 or qint4."""

    def load(self, transformers: Any, setting: str, folder: str, dtype: Any) -> Any:
        quanto: Any = import_module("optimum.quanto")
        model = super().load(transformers, "", folder, dtype)
        quanto.quantize(model, weights=getattr(quanto, setting))
        quanto.freeze(model)
        return model


class LlamaCpp:
    """Setting: q4_0 or q8_0; `q4_0-plain` without the kernels that store weights in another order."""

    def __init__(self, setting: str, folder: str, threads: int) -> None:
        import llama_cpp

        self.c, self.threads = llama_cpp.llama_cpp, threads
        self.c.llama_backend_init()
        self.quiet = self.c.llama_log_callback(lambda level, text, data: None)
        self.c.llama_log_set(self.quiet, None)
        given = self.c.llama_model_default_params()
        given.use_extra_bufts = not setting.endswith("-plain")
        path = f"{folder}.{setting.removesuffix('-plain')}.gguf"
        self.model = self.c.llama_model_load_from_file(path.encode(), given)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.vocab = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.about = {"version": f"llama-cpp-python {llama_cpp.__version__}", "bytes": read_of(path)}
        self.last: list[Any] = []

    def prefill(self, ids: Ids, longest: int) -> Any:
        if self.context is not None:
            self.c.llama_free(self.context)
        given = self.c.llama_context_default_params()
        given.n_ctx, given.n_seq_max = len(ids) * -(-longest // 256) * 256, len(ids)
        given.n_batch = given.n_ubatch = max(512, len(ids) * len(ids[0]))
        given.n_threads = given.n_threads_batch = self.threads
        self.context = self.c.llama_init_from_model(self.model, given)
        self.at = 0
        return self._decode(ids)

    def step(self, tokens: Any) -> Any:
        return self._decode([[int(token)] for token in tokens])

    def _decode(self, ids: Ids) -> list[int]:
        count, length = len(ids) * len(ids[0]), len(ids[0])
        batch = self.c.llama_batch_init(count, 0, 1)
        batch.n_tokens, lasts = count, []
        for row, sequence in enumerate(ids):
            for place, token in enumerate(sequence):
                i = row * length + place
                batch.token[i], batch.pos[i] = token, self.at + place
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = place == length - 1
            lasts.append(row * length + length - 1)
        if self.c.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp refuses the batch")
        self.at += length
        self.last = [self._row(self.c.llama_get_logits_ith(self.context, i)) for i in lasts]
        self.c.llama_batch_free(batch)
        return [int(row.argmax()) for row in self.last]

    def _row(self, logits: Any) -> Any:
        import numpy as np

        place = ctypes.addressof(logits.contents)
        return np.ctypeslib.as_array((ctypes.c_float * self.vocab).from_address(place))


def read_of(path: str) -> int:
    """Bytes of a GGUF file that a token reads: all tensors, of the table of tokens only a head's own."""
    from gguf import GGUFReader

    sizes = {str(t.name): int(t.n_bytes) for t in GGUFReader(path).tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight")
    return sum(sizes.values())


CONTENDERS: dict[str, Callable[[str, str, int], Any]] = {
    "effc": Effc,
    "transformers": Transformers,
    "torchao": Torchao,
    "bitsandbytes": Bitsandbytes,
    "hqq": Hqq,
    "quanto": Quanto,
    "llama.cpp": LlamaCpp,
}


def timed(contender: Any, batch: int, prompt: int, new: int) -> dict[str, float]:
    """Seconds of reading the prompts, and of one step behind them."""
    dice = random.Random(0)
    ids = [[dice.randrange(contender.vocab) for _ in range(prompt)] for _ in range(batch)]
    start = time.perf_counter()
    tokens = contender.prefill(ids, prompt + new)
    read, worked = time.perf_counter(), time.process_time()
    for _ in range(new):
        tokens = contender.step(tokens)
    each = max(1, new)
    step, work = (time.perf_counter() - read) / each, (time.process_time() - worked) / each
    return {"prefill": read - start, "step": step, "work": work}


def surprise(contender: Any, ids: Ids) -> float:
    """Mean nats a token of sequences of one length, each token behind those before it."""
    import numpy as np

    contender.prefill([row[:1] for row in ids], len(ids[0]))
    total = 0.0
    for place in range(1, len(ids[0])):
        logits = contender.last
        rows = np.stack([np.asarray(row, dtype=np.float64) for row in _plain(logits)])
        rows -= rows.max(-1, keepdims=True)
        next_ones = [row[place] for row in ids]
        total += float((np.log(np.exp(rows).sum(-1)) - rows[range(len(ids)), next_ones]).sum())
        contender.step(_as_tokens(logits, next_ones))
    return total / (len(ids) * (len(ids[0]) - 1))


def _plain(logits: Any) -> Any:
    return logits if isinstance(logits, list) else logits.float().numpy()


def _as_tokens(logits: Any, tokens: list[int]) -> Any:
    if isinstance(logits, list):
        return tokens
    import torch

    return torch.tensor(tokens)


def main() -> None:
    name, folder, threads = sys.argv[1:]
    kind, _, setting = name.partition(":")
    contender = CONTENDERS[kind](setting, folder, int(threads))
    print("@", json.dumps(contender.about), flush=True)
    inference: Any = None
    if not isinstance(contender, LlamaCpp):
        import torch

        inference = torch.inference_mode()
        inference.__enter__()
    for line in sys.stdin:
        if line.strip() == "loss":
            held = json.loads(Path(f"{folder}.held.json").read_text())
            print("@", json.dumps({"loss": surprise(contender, held)}), flush=True)
            continue
        print("@", json.dumps(timed(contender, *map(int, line.split()))), flush=True)


if __name__ == "__main__":
    main()
