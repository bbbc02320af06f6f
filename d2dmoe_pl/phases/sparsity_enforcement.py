"""Phase 2: train on, with a penalty that makes the FFNs' activations sparse."""

from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.metrics.activation_sparsity import ActivationSparsity
from d2dmoe_pl.moe.experts.activation_watching import watched_activations
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moe.sparsity_penalties import PENALTIES, Penalty, Schedule, alpha_at, clamped
from d2dmoe_pl.moe.token_context import real_tokens
from d2dmoe_pl.moe.token_streams import TokenIndices
from d2dmoe_pl.phases._hidden_states import HiddenStateKeeping
from d2dmoe_pl.phases._optimized_phase import OptimizedPhase


class SparsityEnforcement(OptimizedPhase):
    """Task loss plus ``alpha`` times the mean over FFNs of a sparsity penalty: D2DMoE (arXiv 2310.04361), section 3.1.

    Args:
        penalty: ``l1``, the sum of magnitudes; ``hoyer``, its square over the sum of squares.
        alpha: Weight of the penalty at its largest.
        schedule: How the weight grows: ``constant``; ``linear`` to the end; ``warmup``, linear to half-way.
        displacement: Penalise ``max(z - displacement, 0)`` of the pre-activation ``z`` instead of the activation.
            Needed for GELU and SiLU, which give no exact zeros: about -10 for vision, about 0 for fine-grained tasks.
        hidden_weight: Weight of how far hidden states go from those before this phase, as for ``FineTuning``.
        kwargs: As for :class:`d2dmoe_pl.phases.OptimizedPhase`.

    Raises:
        ConfigError: If ``alpha`` or ``hidden_weight`` is negative, or the model's hidden states cannot be told.
    """

    can_be_sharded = True

    def __init__(
        self,
        penalty: Penalty = "hoyer",
        alpha: float = 1e-3,
        schedule: Schedule = "constant",
        displacement: float | None = None,
        hidden_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check(alpha >= 0, f"alpha={alpha}: must not be negative")
        self.penalty = penalty
        self.alpha = alpha
        self.schedule = schedule
        self.displacement = displacement
        self._kept = HiddenStateKeeping(hidden_weight)

    def transform_(self, model: nn.Module) -> None:
        ffns = select_ffns(model)
        dense = [ffn for ffn in ffns if not ffn.is_sparse]
        check(
            not dense or self.displacement is not None,
            f"penalty={self.penalty!r} with displacement=None: allowed only on ReLU, but "
            f"{dense[0].name if dense else ''} has {dense[0].activation_name if dense else ''}, which gives no exact "
            "zeros; set displacement (e.g. -10 or 0), or fine-tune with activation=relu first",
        )
        self._kept.begin(model, self)

    def on_fit_start(self) -> None:
        self._kept.place(self)
        self._ffns = select_ffns(self.model)
        self.sparsity = ActivationSparsity([ffn.name for ffn in self._ffns]).to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        indices = TokenIndices(self.model, batch)
        penalties = []

        def watch(name: str, pre: Tensor, post: Tensor) -> None:
            per_token = PENALTIES[self.penalty](self._watched(pre, post)).flatten()  # (B * L,)
            penalties.append(real_tokens(per_token, indices(name)).mean())

        with watched_activations(self._ffns, watch):
            logits, kept = self._kept(self.model, batch)
        task_loss = self.task_loss(logits, batch)
        penalty = sum(penalties) / len(penalties)
        alpha = alpha_at(self.alpha, self.schedule, self.progress())
        loss = task_loss + alpha * penalty
        for name, part in kept.items():
            self.log(f"train/{name}", part.detach())
            loss = loss + self._kept.weight * part
        self.log_dict({"train/loss": loss, "train/task_loss": task_loss, "train/penalty": penalty}, prog_bar=True)
        self.log("train/alpha", alpha)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not self.is_fitting:  # a finished model: nothing to watch
            return super().validation_step(batch, batch_idx, dataloader_idx)
        indices = TokenIndices(self.model, batch)

        def watch(name: str, pre: Tensor, post: Tensor) -> None:
            tokens = self._watched(pre, post).flatten(0, -2)  # (B * L, d_ff)
            self.sparsity.update(name, real_tokens(tokens, indices(name)))

        with watched_activations(self._ffns, watch):
            return super().validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        if self.is_fitting:
            for kind, shares in self.sparsity.compute().items():
                mean = torch.stack(list(shares.values())).mean()
                self.log(f"sparsity/{kind}", mean, sync_dist=True)  # the same on all processes; Lightning cannot know
                self.log_by_layer(f"sparsity_{kind}", shares)
            self.sparsity.reset()
        super().on_validation_epoch_end()

    def _watched(self, pre: Tensor, post: Tensor) -> Tensor:
        """What the penalty acts on, from what the activation function takes and gives."""
        return post if self.displacement is None else clamped(pre, self.displacement)
