"""Read a prompt of 512 tokens at every width: effc's C kernels against the best float32 that torch has.

    python benchmarks/prefill.py [--widths 256 512 768 1024 2048 4096] [--threads 1 2] [--runs 5]
                                 [--tokens 512] [--parts linears model]

Two parts at each width. `linears`: the four matrices of a llama's layer (q, k and v side by side, o, gate and
up side by side, down) on random rows; `model`: a random llama of two layers (one from width 2048 on) from
token ids to the logits behind the last. Contenders are torch's float32, the same prepacked by the faster of
mkldnn and MKL for exactly these rows, and effc's float32, 8 and 4 bits in groups of 64 (bytes of activations
are made within the time). Results are compared before anything is timed. All run in one process and take
turns; a ratio is the median over runs of ratios within a run. Writes JSON to out/bench, prints the table
last.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "decoding"))
from contender import Effc, Transformers
from decode import machine
from merge import make

GROUP = 64
HEAD = 64
VOCAB = 512
DUE = {"float32": "torch", "8 bits": "prepacked", "4 bits": "prepacked"}
"""effc's settings, and what each must be no slower than."""
NEAR = {"mkldnn": 1e-5, "mkl": 1e-5, "float32": 1e-5, "8 bits": 0.03, "4 bits": 0.2}
"""Relative distance from torch's result allowed; 4 bits of normal weights are off by some 12 %."""
SETTINGS = {"float32": "float32", "8 bits": "8", "4 bits": "4"}

Work = Callable[[], Any]


def hidden(width: int) -> int:
    """8/3 of the width, in whole 256s, as llamas have it."""
    return -(-8 * width // 3 // 256) * 256


def linears(width: int, tokens: int, threads: int) -> dict[str, Work]:
    """Contender -> the four matrices of a layer on rows [tokens, K]; each gives the four results."""
    from effc.kernels.cpu.isa import available
    from effc.kernels.dense_linear.call import dense_linear
    from effc.kernels.dense_linear.spec import DenseLinearSpec
    from effc.kernels.quant_linear.call import quant_linear
    from effc.kernels.quant_linear.layout import pack
    from effc.kernels.quant_linear.spec import QuantLinearSpec

    wide, isa = hidden(width), available()[0]
    shapes = [(3 * width, width), (width, width), (2 * wide, width), (width, wide)]
    dice = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, k, generator=dice) / k**0.5 for n, k in shapes]
    inputs = {k: torch.randn(tokens, k, generator=dice) for k in (width, wide)}
    rows = [inputs[k] for _, k in shapes]
    found: dict[str, Work] = {
        "torch": lambda: [nn.functional.linear(x, w) for x, w in zip(rows, weights, strict=True)]
    }
    for name, one in prepackers(tokens).items():
        ready = [one(w) for w in weights]
        found[name] = lambda ready=ready: [call(x) for call, x in zip(ready, rows, strict=True)]
    plain = DenseLinearSpec()
    found["float32"] = lambda: [
        dense_linear(plain, isa, x, w, None, {}, threads) for x, w in zip(rows, weights, strict=True)
    ]
    for bits in (8, 4):
        spec = QuantLinearSpec(bits=bits, group=GROUP)
        packed = [pack(spec, *rounded(w, bits), None) for w in weights]
        found[f"{bits} bits"] = lambda spec=spec, packed=packed: [
            quant_linear(spec, isa, x, p, w.shape[0], {}, threads)
            for x, p, w in zip(rows, packed, weights, strict=True)
        ]
    return found


def prepackers(tokens: int) -> dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]]:
    """Ways to lay out a float32 matrix once for products with so many rows, and to multiply by it."""
    ops: Any = torch.ops

    def by_mkldnn(w: Tensor) -> Callable[[Tensor], Tensor]:
        packed = ops.mkldnn._reorder_linear_weight(w, tokens)
        return lambda x: ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    def by_mkl(w: Tensor) -> Callable[[Tensor], Tensor]:
        packed = ops.mkl._mkl_reorder_linear_weight(w, tokens)
        return lambda x: ops.mkl._mkl_linear(x, packed, w, None, tokens)

    found: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {"mkldnn": by_mkldnn}
    return found | ({"mkl": by_mkl} if torch.backends.mkl.is_available() else {})


def rounded(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [N, K] uint8 and scales [N, K / 64] float16 of the nearest symmetric grid."""
    half = 1 << (bits - 1)
    groups = w.view(w.shape[0], -1, GROUP)
    scales = (groups.abs().amax(-1) / (half - 1)).half()
    codes = (groups / scales.float()[..., None]).round().clamp(-half, half - 1) + half
    return codes.view_as(w).to(torch.uint8), scales


class Prepacked(Transformers):
    """Transformers whose linear layers are laid out for the rows of the prompt; the head is left alone."""

    def load(self, transformers: Any, setting: str, folder: str, dtype: Any) -> Any:
        way, _, tokens = setting.partition(":")
        model = super().load(transformers, "", folder, dtype)
        one = prepackers(int(tokens))[way]
        for module in list(model.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, _Called(one(child.weight.detach()), int(tokens)))
        return model


class _Called(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor], tokens: int) -> None:
        super().__init__()
        self.call, self.tokens = call, tokens

    def forward(self, x: Tensor) -> Tensor:
        """x [1, T, K] -> [1, T, N]"""
        return self.call(x.view(self.tokens, -1))[None]


def models(width: int, tokens: int, threads: int, work: Path) -> dict[str, Work]:
    """Contender -> a prompt through a whole model; each gives the logits behind the last token."""
    layers = 1 if width >= 2048 else 2
    shape = {"layers": layers, "width": width, "hidden": hidden(width), "heads": width // HEAD}
    folder = work / f"width-{width}"
    if not folder.is_dir():
        make(folder, shape | {"vocab": VOCAB, "tied": False}, 0, None)
    made: dict[str, Any] = {"torch": Transformers("float32", str(folder), threads)}
    made |= {way: Prepacked(f"{way}:{tokens}", str(folder), threads) for way in prepackers(tokens)}
    made |= {name: Effc(setting, str(folder), threads) for name, setting in SETTINGS.items()}
    ids = torch.randint(0, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0)).tolist()

    def through(contender: Any) -> Work:
        def read() -> list[Tensor]:
            contender.prefill(ids, tokens)
            return [contender.last.float()]

        return read

    return {name: through(contender) for name, contender in made.items()}


def compared(contenders: Mapping[str, Work]) -> dict[str, float]:
    """Relative distance of each contender's results from torch's.

    Raises:
        SystemExit: one is farther off than it may be.
    """
    due = contenders["torch"]()
    off = {}
    for name, work in contenders.items():
        if name == "torch":
            continue
        pairs = zip(work(), due, strict=True)
        off[name] = max(float((found - one).norm() / one.norm()) for found, one in pairs)
        if not off[name] <= NEAR[name]:
            raise SystemExit(f"{name} is off by {off[name]:.2g}, {NEAR[name]:.2g} allowed")
    return off


def timed(contenders: Mapping[str, Work], runs: int) -> dict[str, list[float]]:
    """Contender -> seconds of each run; contenders take turns within a run."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(runs + 1):
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            if run:  # the first run warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def row(
    width: int, part: str, threads: int, off: Mapping[str, float], seconds: Mapping[str, list[float]]
) -> dict[str, Any]:
    """One line: milliseconds of each, and by how much effc is ahead of what it is measured against."""
    packed = min(("mkldnn", "mkl"), key=lambda way: statistics.median(seconds.get(way, [float("inf")])))
    against = {"torch": seconds["torch"], "prepacked": seconds[packed]}
    ahead = {
        name: {
            peer: statistics.median(theirs / mine for theirs, mine in zip(times, seconds[name], strict=True))
            for peer, times in against.items()
        }
        for name in DUE
    }
    start = {"width": width, "part": part, "threads": threads, "prepacked by": packed, "off": dict(off)}
    return start | {"ms": {n: 1e3 * statistics.median(s) for n, s in seconds.items()}, "ahead": ahead}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds, then how many times as fast effc is as torch (float32) and as prepacked float32."""
    lines = [("width", "part", "threads", "torch", "prepacked", *DUE, *(f"{n} ahead" for n in DUE))]
    for one in rows:
        ms = one["ms"]
        times = [ms["torch"], ms[one["prepacked by"]], *(ms[name] for name in DUE)]
        ratios = [
            f"{one['ahead'][name]['torch']:.2f}x / {one['ahead'][name]['prepacked']:.2f}x" for name in DUE
        ]
        start = (str(one["width"]), one["part"], str(one["threads"]))
        lines.append((*start, *(f"{t:.2f} ms" for t in times), *ratios))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where effc is slower than it may be; or that it is nowhere."""
    slower = [
        f"{one['part']} at {one['width']}, {one['threads']} threads: {name} is "
        f"{one['ahead'][name][peer]:.2f}x as fast as {peer}"
        for one in rows
        for name, peer in DUE.items()
        if one["ahead"][name][peer] < 1
    ]
    return slower or ["4 and 8 bits are nowhere slower than prepacked float32, float32 than torch's"]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--widths", nargs="+", type=int, default=[256, 512, 768, 1024, 2048, 4096])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--parts", nargs="+", choices=("linears", "model"), default=["linears", "model"])
    options = parser.parse_args(words)
    rows: list[dict[str, Any]] = []
    place = Path("out/bench/prefill.json")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="effc-bench-prefill-") as work, torch.inference_mode():
        for threads in options.threads:
            torch.set_num_threads(threads)
            for width in options.widths:
                for part in options.parts:
                    given = (width, options.tokens, threads)
                    contenders = linears(*given) if part == "linears" else models(*given, Path(work))
                    off = compared(contenders)
                    rows.append(row(width, part, threads, off, timed(contenders, options.runs)))
                    del contenders
                    gc.collect()
                    print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
                    date = datetime.now(UTC).isoformat(timespec="seconds")
                    record = {"machine": machine(), "date": date, "tokens": options.tokens, "rows": rows}
                    place.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(
        f"{machine()}; {options.tokens} tokens; medians of {options.runs} alternated runs; written to {place}"
    )
    print(table(rows))
    print("\n".join(verdicts(rows)))


if __name__ == "__main__":
    main()
