"""Linears whose weight is computed from other numbers; `dense()` of each gives it, [o, i]."""

from effc.compiler.blocks.hashed_linear import HashedLinear
from effc.compiler.blocks.low_rank_linear import LowRankLinear
from effc.compiler.blocks.planes_linear import PlanesLinear
from effc.compiler.blocks.sparse_low_rank_linear import SparseLowRankLinear

FORMED = LowRankLinear | SparseLowRankLinear | PlanesLinear | HashedLinear
