"""A plan as C text: one function a kind of layer, a loop over equal layers, barriers where members must wait.

Every member runs all of the program and does its share of each call. A barrier stands before a call that
reads what another member may have written, or writes what another may still read, since the last barrier.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import groupby

from effc.kernels import choose_token
from effc.kernels.choose_token import ChooseTokenSpec
from effc.kernels.cpu.team import TEAM_HEADER
from effc.kernels.cpu.vectors import VECTORS
from effc.kernels.program.call import Call, Plan, Split
from effc.kernels.program.memory import places
from effc.kernels.program.settle import kernels as tried
from effc.kernels.quant_linear import trial

LOGITS = "logits"
"""The buffer that the caller gives."""
_ELSEWHERE = 1 << 60
CHOICE = ChooseTokenSpec()
FEW = 2
"""Up to this many rows, each member does row-wise calls for itself instead of waiting for the others."""

STRUCT = r"""
struct cache {   /* of one attention: what it keeps, room for S tokens of each sequence, its angles; of a
                    recurrence its states, as keys */
  void *keys, *values;
  long S;
  const float *cosines, *sines;
};

struct program {
  const struct team *team;
  long members, M, wanted_rows, capacity, own_bytes;
  const long *token, *slot, *position, *wanted;
  float *logits;
  long *chosen;   /* token of each wanted row; null where nobody asks */
  float *best;    /* of each part of each wanted row, and where it stands */
  long *where;
  char *arena, *own;
  const void *const *tensors;
  const struct cache *caches;
};
"""

_LAYER = r"""
static void {name}(const struct program *a, int member, int members, const void *const *w,
                   const struct cache *cache) {{
  const long M = {rows}, few = M <= {few};
  const long r0 = few ? 0 : M * member / members, r1 = few ? M : M * (member + 1) / members;
  const long s0 = M * member / members, s1 = M * (member + 1) / members;
  char *const mine = a->own + member * a->own_bytes;
  char *const shared = a->arena, *const rows = few ? mine : shared;
  const long capacity = a->capacity, row_capacity = few ? {few} : capacity;
{body}
}}
"""

_MAIN = r"""
static void work(void *given, int member, int members) {{
  const struct program *a = given;
{calls}
  if (a->chosen) {{
    const long parts = members < {vocab} ? members : {vocab}, W = a->wanted_rows, items = W * parts;
    a->team->meet(members);
    choose_parts_{choice}(a->logits, {vocab}, parts, a->best, a->where,
                 items * member / members, items * (member + 1) / members);
    a->team->meet(members);
    choose_token_{choice}(a->best, a->where, parts, a->chosen,
                 W * member / members, W * (member + 1) / members);
  }}
}}

void program(struct program *a) {{ a->team->run(work, a, (int)a->members); }}
long arena_bytes(long capacity) {{ return {arena} * capacity; }}
long own_bytes(void) {{ return {own}; }}
"""


def emit(plan: Plan) -> tuple[str, list[str]]:
    """The text, and the names of its tensors in the order of its table."""
    offsets, width = places(plan.calls, plan.widths, plan.aliases)
    offsets[LOGITS] = _ELSEWHERE
    own = -(-width * FEW // 64) * 64
    bodies: list[str] = []
    names: dict[str, str] = {}
    lines: list[str] = []
    tensors: list[str] = []
    sections = [list(group) for _, group in groupby(enumerate(plan.calls), key=lambda e: _section(plan, *e))]
    runs: list[tuple[str, int, int, int]] = []  # function, times, tensors each, caches each
    for section in sections:
        calls = [call for _, call in section]
        tail = section[0][0] >= plan.tail
        body = _body(plan, calls, offsets, first=not runs)
        if body not in names:
            names[body] = f"part_{len(names)}"
            rows = "a->wanted_rows" if tail else "a->M"
            bodies.append(_LAYER.format(name=names[body], rows=rows, few=FEW, body=body))
        held = [t for call in calls for t in call.tensors]
        kept = sum(call.opens for call in calls)
        tensors += held
        if runs and runs[-1][0] == names[body] and runs[-1][2:] == (len(held), kept):
            runs[-1] = (names[body], runs[-1][1] + 1, len(held), kept)
        else:
            runs.append((names[body], 1, len(held), kept))
    first = caches = 0
    for name, times, each, kept in runs:
        lines.append(
            f"  for (long i = 0; i < {times}; i++) "
            f"{name}(a, member, members, a->tensors + {first} + i * {each}, "
            f"a->caches + {caches} + i * {kept});"
        )
        first, caches = first + times * each, caches + times * kept
    functions = list(dict.fromkeys(text for call in plan.calls for text in call.functions))
    functions += [trial.function(spec) for spec, _ in tried(plan).values()]
    functions.append(choose_token.function(CHOICE))
    main = _MAIN.format(
        calls="\n".join(lines), arena=width, own=own, vocab=f"{plan.vocab}L", choice=CHOICE.key
    )
    text = "\n".join((VECTORS, TEAM_HEADER, *functions, STRUCT, *bodies, main))
    return f"{_title(text)}\n{text}", tensors


def _title(text: str) -> str:
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    what = "One step of a decoder over rows of any mix of sequences."
    return f"/* Generated by effc, program {key}. Do not edit.\n   {what} */"


def _section(plan: Plan, place: int, call: Call) -> tuple[bool, int | None]:
    """Calls of one layer stand together; those behind the last layer work on wanted rows."""
    return place >= plan.tail, call.layer


def _body(plan: Plan, calls: Sequence[Call], offsets: dict[str, int], first: bool) -> str:
    """The statements of one section, with the barriers they need; nothing stands before the first section."""
    lines: list[str] = [] if first else ["  a->team->meet(members);"]
    since, own = _Since(), _row_buffers(plan)
    count, kept = 0, -1
    for call in calls:
        now = [(_span(plan, offsets, n), n in own) for n in call.reads if n in offsets]
        after = [_span(plan, offsets, n) for n in call.writes if n in offsets]
        lines += since.barrier(call.split, now, after, call.across)
        lines.append(f"  /* {call.op}: {', '.join(_local(p) for p in call.paths)} */")
        if call.split is Split.ITEMS:
            lines.append(f"  {{ const long i0 = ({call.items}) * member / members,")
            lines.append(f"      i1 = ({call.items}) * (member + 1) / members;")
        kept += call.opens
        lines.append(_addressed(plan, call, offsets, count, kept))
        if call.split is Split.ITEMS:
            lines.append("  }")
        count += len(call.tensors)
    return "\n".join(lines)


Span = tuple[int, int]


class _Since:
    """What has been written and read since the last barrier, as spans of bytes a row."""

    def __init__(self) -> None:
        self.written: list[tuple[Span, Split]] = []
        self.read: list[tuple[Span, Split, bool]] = []
        """The last: whether, with few rows, it was read from the member's own memory."""

    def barrier(
        self, split: Split, now: Sequence[tuple[Span, bool]], after: Sequence[Span], anywhere: bool
    ) -> list[str]:
        """The barrier that a call needs before it, if any; then the call counts as done.

        A row-wise call may follow a row-wise call without one as long as a member's rows lie in one place: in
        equal spans. Rows of another width in the same memory are other members' rows, and so are those that a
        call reads `anywhere`.
        """
        rows = Split.ROWS
        alone = split is rows
        touched = [*(span for span, _ in now), *after]
        foreign = [(span, s) for span, s in self.written if _overlap(span, touched)]
        always = any(s is not rows for _, s in foreign)
        reads = [(span, s, own) for span, s, own in self.read if _overlap(span, after)]
        always |= any(not own for _, _, own in reads if not alone)
        foreign += [(span, s) for span, s, _ in reads]
        moved = anywhere or any(s is not rows or span not in touched for span, s in foreign)
        lines = []
        if always:
            self.written, self.read = [], []
            lines = ["  a->team->meet(members);"]
        elif foreign and (moved or not alone):  # with few rows each member touches its own memory alone
            self.written = [w for w in self.written if w[1] is not rows]
            self.read = [r for r in self.read if r[1] is not rows or not r[2]]
            lines = ["  if (!few) a->team->meet(members);"]
        self.written += [(span, split) for span in after]
        self.read += [(span, Split.ITEMS if anywhere else split, own) for span, own in now]
        return lines


def _span(plan: Plan, offsets: dict[str, int], name: str) -> Span:
    return offsets[name], offsets[name] + plan.widths.get(name, 1)


def _overlap(span: Span, others: Sequence[Span]) -> bool:
    return any(span[0] < end and begin < span[1] for begin, end in others)


def _addressed(plan: Plan, call: Call, offsets: dict[str, int], first: int, kept: int) -> str:
    """The statement with buffers and tensors put in."""
    local = _row_buffers(plan)

    def address(found: re.Match[str]) -> str:
        name = found.group(1)
        if name.isdigit():
            return f"w[{first + int(name)}]"
        if name == LOGITS:
            return "a->logits"
        if name == "cache":
            return f"cache[{kept}]"
        if name in local:
            return f"(void *)(rows + {offsets[name]} * row_capacity)"
        return f"(void *)(shared + {offsets[name]} * capacity)"

    return "    " + re.sub(r"\{(\w+)\}", address, call.text)


def _row_buffers(plan: Plan) -> set[str]:
    """Buffers that only row-wise calls write: with few rows each member has its own."""
    return {name for call in plan.calls if call.split is Split.ROWS for name in call.writes}


def _local(path: str) -> str:
    """A path without the number of its layer, so that equal layers have equal text."""
    return re.sub(r"^layers\.\d+\.", "layer.", path)
