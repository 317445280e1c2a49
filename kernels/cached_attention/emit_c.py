"""cached_attention in C: write keys and values, then, behind a barrier, attend to them.

Decoding one token is bound by reading the cache, so the query heads of a group share every loaded vector. In
a prefill consecutive tokens of one sequence share them too. The sums of a token do not depend on what it
shares: scores add up over the head, weights over the keys in their order, the softmax over steps of 64 keys.
"""

from __future__ import annotations

from effc.kernels.cached_attention.attend_c import ATTEND
from effc.kernels.cached_attention.spec import KEYS, CachedAttentionSpec
from effc.kernels.cached_attention.write_c import WRITE
from effc.kernels.cpu.entry import self_contained
from effc.kernels.cpu.parts import PARTS

ROWS = 16
"""Query heads times tokens that share loaded keys; proved bit-equal, so not in the spec."""


def emit(spec: CachedAttentionSpec) -> str:
    """A file that compiles on its own: both functions and an entry that the team runs."""
    cell = _names(spec)["cell"]
    pointers = dict.fromkeys(("q", "k", "v"), "const float *")
    pointers |= dict.fromkeys(("slot", "position", "turn"), "const int64_t *")
    pointers |= dict.fromkeys(("cosines", "sines", "q_gain", "k_gain"), "const float *")
    pointers |= {"keys": f"{cell} *", "values": f"{cell} *", "queries": "float *", "y": "float *"}
    fields = pointers | dict.fromkeys(("q_stride", "k_stride", "v_stride", "M", "S"), "long")
    work = f"""  const long items = a->M * {spec.kv_heads};
  const long first = items * member / members, last = items * (member + 1) / members;
  write_cache_{spec.key}(a->q, a->k, a->v, a->q_stride, a->k_stride, a->v_stride, a->slot, a->position,
                         a->turn, a->cosines, a->sines, a->q_gain, a->k_gain, a->keys, a->values, a->queries,
                         a->M, a->S, first, last);
  a->team->meet(members);
  attend_{spec.key}(a->queries, a->keys, a->values, a->slot, a->position, a->y, a->M, a->S, first, last);"""
    return self_contained(spec, function(spec), fields, work)


def function(spec: CachedAttentionSpec) -> str:
    """Both functions, each over items first to last of the M Hk pairs of a row and a kv head.

    `write_cache_<key>` puts the rows' keys and values into the cache and their queries, turned and scaled,
    into `queries` [Hk, M, G, h]; `attend_<key>` reads them when all members have done so. No scratch.
    """
    names = _names(spec)
    return PARTS + WRITE.substitute(names) + ATTEND.substitute(names)


def _names(spec: CachedAttentionSpec) -> dict[str, object]:
    """What the templates name: the numbers of the spec and the lines that differ with it."""
    wide = spec.cell == "float32"
    tokens = max(1, ROWS // spec.group)
    return {
        "key": spec.key,
        "kv_heads": spec.kv_heads,
        "group": spec.group,
        "h": spec.head_dim,
        "padded": spec.padded,
        "vectors": spec.padded // 16,
        "half": spec.rotated // 2,
        "norm": int(spec.norm > 0),
        "eps": f"{spec.norm!r}f" if spec.norm else "0",
        "offset": f"{spec.norm_offset!r}f",
        "scale": f"{spec.scale!r}f",
        "step": KEYS,
        "tokens": tokens,
        "rows": tokens * spec.group,
        "cell": "float" if wide else "uint16_t",
        "load": f"part_{spec.cell}",
        "as_cell": "" if wide else f"nearest_bf16_{spec.key}",
        "at": "position[m] % S" if spec.ring else "position[m]",
        "chunk": "base % S" if spec.ring else "base",
        "begin": "begin % S" if spec.ring else "begin",
        "window": spec.window or 0,
        "cap": f"a = {spec.cap!r}f * hyperbolic_tangent(a * {1 / spec.cap!r}f);" if spec.cap else "",
    }
