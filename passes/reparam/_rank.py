"""RankRule: a part that reads the rank of a weight off its singular values."""

from __future__ import annotations

from torch import Tensor

from effc.compiler.method import Part


class RankRule(Part):
    """Fills the slot `rank`, e.g. `rank = energy(95%)`."""

    def of(self, spectrum: Tensor) -> int:
        """The rank kept of a weight with these singular values [min(o, i)], descending; at least 1."""
        raise NotImplementedError
