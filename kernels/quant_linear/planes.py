"""C text that vectors and matrix units share: a step of a packed matrix unpacked, and a result finished."""

from __future__ import annotations

from effc.kernels.quant_linear.spec import BLOCK, QuantLinearSpec


def head(spec: QuantLinearSpec) -> int:
    """Bytes of scales and zero codes in front of a group's codes."""
    return BLOCK * (2 if spec.symmetric else 3)


def step_bytes(spec: QuantLinearSpec) -> int:
    """Bytes of one step: its vectors of every 16 channels."""
    return 4 * 64 * (3 if spec.bits == 3 else 1)


def scale(spec: QuantLinearSpec) -> str:
    """The function that reads 16 scales."""
    return "load_f16" if spec.scale == "float16" else "load_bf16"


def unpacked(spec: QuantLinearSpec, use: str) -> str:
    """Statements on vector `v` of the step at `codes`: `use` for each plane, with {w} its 16 x 4 codes
    (an expression or a name of type u8x64) and {at} the first of its four columns in the step."""
    if spec.bits == 8:
        return "        u8x64 q = load_bytes(codes + 64 * v);\n        " + use.format(w="q", at=0)
    if spec.bits != 3:
        lines = ["u32x16 q = (u32x16)load_bytes(codes + 64 * v);"]
        mask = f"0x{((1 << spec.bits) - 1) * 0x01010101:08x}u"
        for plane in range(8 // spec.bits):
            code = f"(u8x64)((q >> {spec.bits * plane}) & {mask})" if plane else f"(u8x64)(q & {mask})"
            lines.append(f"{{ u8x64 c = {code}; {use.format(w='c', at=4 * plane)} }}")
    else:
        lines = [
            "const uint8_t *three = codes + 192 * v;",
            "u32x16 low[2] = {(u32x16)load_bytes(three), (u32x16)load_bytes(three + 64)};",
            "u32x16 high = (u32x16)load_bytes(three + 128);",
        ]
        for plane in range(8):
            low = f"((low[{plane // 4}] >> {2 * (plane % 4)}) & 0x03030303u)"
            code = f"(u8x64)({low} | (((high >> {plane}) & 0x01010101u) << 2))"
            lines.append(f"{{ u8x64 c = {code}; {use.format(w='c', at=4 * plane)} }}")
    return "\n".join("        " + line for line in lines)


def finished(paired: bool, epilogue: tuple[str, ...], vectors: int, chains: dict[str, str]) -> str:
    """The epilogue on each vector `f[r][i]` of row `m`, then the store; `chains` is its C by name."""
    chain = list(epilogue)
    lines = [
        f"TILED for (int i = 0; i < {vectors // 2 if paired else vectors}; i++) {{",
        "  const long n = block * COLUMNS + 16 * (v0 + i), count = N - n;",
        "  if (count <= 0) continue;",
        "  f32x16 a = f[r][i];",
    ]
    if paired:
        lines += [f"  a = {chains[chain.pop(0)]};", f"  a = a * f[r][i + {vectors // 2}];"]
    lines += [f"  a = {chains[name]};" for name in chain]
    lines += ["  give(y + m * N + n, a, count);", "}"]
    return "\n".join("    " + line for line in lines)
