"""One LightningModule a phase. A phase starts from the artifact of another through ``init_from``."""

from d2dmoe_pl.phases.attention_distillation import AttentionDistillation
from d2dmoe_pl.phases.base import OptimizedPhase, Phase
from d2dmoe_pl.phases.expert_clustering import ExpertClustering
from d2dmoe_pl.phases.expert_selection import ExpertSelection
from d2dmoe_pl.phases.fine_tuning import FineTuning
from d2dmoe_pl.phases.importance_scoring import ImportanceScoring
from d2dmoe_pl.phases.moebert_distillation import MoEBERTDistillation
from d2dmoe_pl.phases.recovery_tuning import RecoveryTuning
from d2dmoe_pl.phases.router_regression import RouterRegression
from d2dmoe_pl.phases.sparsity_enforcement import SparsityEnforcement

__all__ = [
    "AttentionDistillation",
    "ExpertClustering",
    "ExpertSelection",
    "FineTuning",
    "ImportanceScoring",
    "MoEBERTDistillation",
    "OptimizedPhase",
    "Phase",
    "RecoveryTuning",
    "RouterRegression",
    "SparsityEnforcement",
]
