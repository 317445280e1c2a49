"""embed in C: one row at a time; a packed row is unpacked from the layout that the linear layer reads."""

from __future__ import annotations

from functools import cache

from effc.kernels.cpu.entry import self_contained
from effc.kernels.cpu.stored import STORED
from effc.kernels.embed.spec import EmbedSpec
from effc.kernels.quant_linear.spec import BLOCK, QuantLinearSpec


def function(spec: EmbedSpec) -> str:
    """`embed_<key>` on rows first to last; pointers that the spec has no use for may be null.

    ids and place [M] long, x [M, D] float32; `table`, `positions` and `types` as the spec says they are
    stored. Nothing is checked: ids < V, place + offset < P.
    """
    kind = spec.table or "float32"
    lines = []
    if spec.packed is None:
        head = f"const stored_{kind} *row = (const stored_{kind} *)table + ids[m] * D;"
        lines.append(f"f32x16 a = take_{kind}(row + k, count);")
    else:
        head = f"unpack_{spec.key}(table, ids[m], p, D);"
        lines.append("f32x16 a = take(p + k, count);")
    if spec.scale != 1.0:
        lines.append(f"a = a * {float(spec.scale)!r}f;")
    if spec.types is not None:
        lines.append(f"a = a + take_{spec.types}((const stored_{spec.types} *)types + k, count);")
    if spec.positions is not None:
        at = f"(place[m] + {spec.position_offset}L) * D + k"
        lines.append(
            f"a = a + take_{spec.positions}((const stored_{spec.positions} *)positions + {at}, count);"
        )
    body = "\n".join(f"      {line}" for line in lines)
    return f"""{STORED}{"" if spec.packed is None else _unpack(spec.key, spec.packed)}
static void embed_{spec.key}(const long *RESTRICT ids, const long *RESTRICT place,
    const void *RESTRICT table, const void *RESTRICT positions, const void *RESTRICT types,
    float *RESTRICT x, long D, long first, long last) {{
  for (long m = first; m < last; m++) {{
    float *p = x + m * D;
    {head}
    for (long k = 0; k < D; k += 16) {{
      const long count = D - k;
{body}
      give(p + k, a, count);
    }}
  }}
}}
"""


def _unpack(key: str, spec: QuantLinearSpec) -> str:
    """One row of the packed matrix as numbers: (code - zero code) scale, exact in float32."""
    start = BLOCK * (2 if spec.symmetric else 3)
    width = f"{spec.group}L" if spec.group else "D"
    zero = str(spec.mid) if spec.symmetric else f"p[{2 * BLOCK} + c]"
    scale = "load_f16" if spec.scale == "float16" else "load_bf16"
    vectors, lanes = (3, 16) if spec.bits == 3 else (1, spec.columns)
    low = 2 if spec.bits == 3 else spec.bits
    # the code of column t of a step: byte t % 4 of the word, plane t / 4
    shifts = ", ".join(str((8 * (t % 4) + low * (t // 4)) % 32) for t in range(16))
    lines = [
        "u32x16 code = ((u32x16){0} + word[i]) >> shifts & " + f"{(1 << low) - 1}u;",
        "f32x16 v = (to_float((i32x16)code) - zero) * scale;",
        f"memcpy(y + 16 * i, &v, {4 * lanes});",
    ]
    if spec.bits == 3:
        high = ", ".join(str(8 * (t % 4) + t // 4) for t in range(16))
        lines.insert(1, f"code |= (((u32x16){{0}} + word[2]) >> ((u32x16){{{high}}} + 4u * i) & 1u) << 2;")
    body = "\n".join(f"        {line}" for line in lines)
    return f"""
static void unpack_{key}(const uint8_t *RESTRICT w, long row, float *RESTRICT y, long D) {{
  const long width = {width}, groups = D / width, size = {start}L + width * {BLOCK * spec.bits // 8};
  const u32x16 shifts = {{{shifts}}};
  const long c = row % {BLOCK};
  const uint8_t *p = w + row / {BLOCK} * groups * size;
  for (long g = 0; g < groups; g++, p += size) {{
    uint16_t stored[16] = {{0}};
    memcpy(stored, p + 2 * c, 2);
    const float scale = {scale}(stored)[0], zero = {zero};
    const uint8_t *codes = p + {start} + {64 * vectors} * (c / 16) + 4 * (c % 16);
    for (long s = 0; s < width; s += {spec.columns}, codes += {4 * 64 * vectors}, y += {spec.columns}) {{
      uint32_t word[{vectors}];
      for (int i = 0; i < {vectors}; i++) memcpy(word + i, codes + 64 * i, 4);
      for (uint32_t i = 0; i < {spec.columns // lanes}; i++) {{
{body}
      }}
    }}
  }}
}}
"""


FIELDS = {
    "ids": "const long *",
    "place": "const long *",
    "table": "const void *",
    "positions": "const void *",
    "types": "const void *",
    "x": "float *",
    "M": "long",
    "D": "long",
}


@cache
def emit(spec: EmbedSpec) -> str:
    """The self-contained file."""
    work = (
        f"  embed_{spec.key}(a->ids, a->place, a->table, a->positions, a->types, a->x, a->D,\n"
        "                   a->M * member / members, a->M * (member + 1) / members);"
    )
    return self_contained(spec, function(spec), FIELDS, work)
