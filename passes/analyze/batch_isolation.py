"""Prove that no output row of a model depends on another row of its batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from effc.compiler.contract import EXACT, Contract
from effc.compiler.cost import count
from effc.compiler.effort import width
from effc.compiler.findings import Finding, Findings
from effc.compiler.isolation import Isolation, Leak, isolation
from effc.compiler.labels import MOST_ROWS
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.shapes import Analyze
from effc.passes._waived import on_a_decoder
from effc.specs.paper import Paper


class BatchIsolation(Analyze):
    """Show that y_b depends on x_b alone, for every row b, or name each place where rows meet.

    The model runs once with the set of rows that each number depends on beside it: unions for what an
    operation reads, nothing for weights. Outputs that carry their own row alone are proved isolated, whatever
    the numbers are. Whole and padded rows and, of decoders, a further token behind a cache are followed, by
    the ops that are lowered. What depends on another row in form only (a factor of zero) is told as well.

    Use when: requests of different people share a batch, above all after stages that quantize activations,
              route tokens or normalize.
    Costs:    a run over a few tokens, a few times over. Nothing is said of time and of kernels' own mistakes.
    """

    paper = Paper(
        "Architectural Backdoors for Within-Batch Data Stealing and Model Inference Manipulation",
        arxiv="2505.18323",
        year=2025,
        section="6",
    )
    contract = Contract(EXACT)
    waives: ClassVar[Mapping[str, str]] = on_a_decoder(
        "an analysis gives no model; tests/passes/test_batch_isolation.py looks at what it says"
    )
    examples = (
        "analyze.batch_isolation()",
        "analyze.batch_isolation(batch = 3, phase = training)",
    )

    batch: int = Field(
        default=2, ge=2, le=MOST_ROWS, description="rows that are told apart; one shows nothing"
    )
    length: int = Field(default=5, ge=2, le=64, description="tokens of each row")
    phase: Literal["inference", "training"] = Field(
        default="inference", description="the graph as it serves, or the blocks' own code as it trains"
    )

    def analyze(self, model: Model) -> Findings:
        found = isolation(model, self.batch, self.length, self.phase == "training")
        numbers = {"rows": self.batch, "outputs": found.outputs, "operations": found.operations}
        return Findings(_words(found), tuple(map(_finding, found.leaks)), numbers)

    def work(self, model: Model, seq: int = 0) -> Work:
        tokens = 4 * self.batch * self.length
        cost = count(model, self.length)
        followed = 64.0 * tokens * (self.length + 8 * width(model)) * max(1, model.layers)
        return Work(flops=2.0 * tokens * cost.flops_per_token, disk=2 * cost.bytes, traffic=followed)


def _words(found: Isolation) -> str:
    phases = f"{', '.join(found.phases)}; {found.operations} operations followed"
    if not found.isolated:
        return f"an output row depends on another in {len(found.leaks)} places ({phases})"
    noise = " they draw random numbers;" if found.random else ""
    return f"no output row depends on another:{noise} {found.outputs} outputs judged ({phases})"


def _finding(leak: Leak) -> Finding:
    rows = " and ".join(map(str, leak.rows)) or "some"
    what = f"{leak.op or 'an operation'} {leak.why}: rows {rows} ({leak.phase})"
    return Finding(leak.node, what, leak.repair)
