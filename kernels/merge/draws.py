"""Numbers of 16 bits drawn by seed, model, tensor and place alone: Philox 4x64-10, as numpy has it.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011), section 3.3. One count of the
generator gives 16 draws; those of number i of a tensor are the draws i % 16 of count i // 16.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from effc.compiler.shapes import Array, Spot

ODDS = 1 << 16
"""A number is drawn from this many."""
DRAWN = 16
"""Numbers of 16 bits that one count of the generator gives."""
CHUNK = 1024
"""Numbers for which C draws at once."""


def key_of(seed: int, model: int, tensor: str) -> int:
    """The key of 128 bits that the draws for one tensor of one model follow from."""
    return int.from_bytes(blake2b(f"{seed} {model} {tensor}".encode(), digest_size=16).digest(), "little")


def drawn(seed: int, model: int, spot: Spot, size: int) -> Array:
    """[size] uint16, each value as likely: the draws from `spot` on, the same however a tensor is cut."""
    count, before = divmod(spot.start, DRAWN)
    stream = np.random.Philox(key=key_of(seed, model, spot.tensor), counter=count)
    words = stream.random_raw(-(-(before + size) // 4))
    found: Array = words.astype("<u8", copy=False).view("<u2")[before : before + size]
    return found


DRAWS = rf"""
enum {{ DRAWN = {DRAWN}, CHUNK = {CHUNK}, COUNTS = CHUNK / DRAWN + 1 }};

/* the draws of COUNTS counts from `count` on; numpy counts up before it draws */
static void draw(const uint64_t *key, uint64_t count, uint16_t *into) {{
  for (int n = 0; n < COUNTS; n++) {{
    uint64_t c[4] = {{count + 1 + (uint64_t)n, 0, 0, 0}}, k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {{
      const unsigned __int128 p = (unsigned __int128)0xD2E7470EE14C6C93u * c[0];
      const unsigned __int128 q = (unsigned __int128)0xCA5A826395121157u * c[2];
      c[0] = (uint64_t)(q >> 64) ^ c[1] ^ k0;
      c[1] = (uint64_t)q;
      c[2] = (uint64_t)(p >> 64) ^ c[3] ^ k1;
      c[3] = (uint64_t)p;
      k0 += 0x9E3779B97F4A7C15u;
      k1 += 0xBB67AE8584CAA73Bu;
    }}
    memcpy(into + DRAWN * n, c, sizeof c);
  }}
}}
"""
