"""Blocks and units: the modules a model is made of, each with a typed constructor and no pickle."""

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.averaged import Averaged
from effc.compiler.blocks.carved import Carved, Channels
from effc.compiler.blocks.coded_attention import CodedAttention
from effc.compiler.blocks.coded_linear import CodedLinear
from effc.compiler.blocks.embedding import Embedding, Table
from effc.compiler.blocks.hashed_linear import HashedLinear
from effc.compiler.blocks.head import Scale, Softcap
from effc.compiler.blocks.linear import Linear, StackedLinear
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.low_rank_linear import LowRankLinear
from effc.compiler.blocks.mlp import MLP
from effc.compiler.blocks.moe import Experts, MoE
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.patch_embed import PatchEmbed
from effc.compiler.blocks.planes_linear import PlanesLinear
from effc.compiler.blocks.pre_gate import PreGate
from effc.compiler.blocks.quant_linear import QuantEmbedding, QuantLinear, QuantStackedLinear
from effc.compiler.blocks.routed_lora import GatedLora, RoutedLora
from effc.compiler.blocks.sparse_low_rank_linear import SparseLowRankLinear
from effc.compiler.blocks.tempered import Tempered
from effc.compiler.blocks.unit import REGISTRY, Unit

__all__ = [
    "MLP",
    "REGISTRY",
    "Attention",
    "Averaged",
    "Carved",
    "Channels",
    "CodedAttention",
    "CodedLinear",
    "Embedding",
    "Experts",
    "GatedLora",
    "HashedLinear",
    "Linear",
    "LoraLinear",
    "LowRankLinear",
    "MoE",
    "Norm",
    "PatchEmbed",
    "PlanesLinear",
    "PreGate",
    "QuantEmbedding",
    "QuantLinear",
    "QuantStackedLinear",
    "RoutedLora",
    "Scale",
    "Softcap",
    "SparseLowRankLinear",
    "StackedLinear",
    "Table",
    "Tempered",
    "Unit",
]
