"""The study's settings of the sparse mechanisms; a variant picks some of them."""

from detectron2.config import LazyCall as L

from dset_d2.modeling.sparse import MemoryPruningConfig, MoEConfig, PruningConfig

# Keeps everything at first, 70 % after ten epochs of a hundred.
_pruning = L(PruningConfig)(keep_ratio=0.7, end_step="${part_of_run:10,100}")
# What the study's first document has otherwise.
_literal_pruning = L(PruningConfig)(
    keep_ratio=0.7,
    end_step="${part_of_run:10,200}",
    restore="zero",
    spatial_prior="centre",
    foreground_weight=0.0,
    sparsity_weight=0.001,
    diversity_weight=0.001,
)
_memory_pruning = L(MemoryPruningConfig)(keep_ratio=0.5, end_step="${part_of_run:10,100}")
# Fine-grained: all experts together are as wide as the dense FFN; a token uses half of it.
_patch_moe = L(MoEConfig)(num_experts=4, top_k=2, balance_weight=0.03)
_decoder_moe = L(MoEConfig)(num_experts=6, top_k=3, balance_weight=0.05)
