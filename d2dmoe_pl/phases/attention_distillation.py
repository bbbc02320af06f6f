"""Between phases 1 and 2, where projections are to become experts too: MLPs in their place that learn to be them."""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.adapters import ROLES, Projection, Role
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.moe.experts.activation_watching import watched_activations
from d2dmoe_pl.moe.projections import (
    ProjectionConfig,
    projection_ffns,
    projection_mlps,
    replace_projections_,
    select_projections,
)
from d2dmoe_pl.moe.sparsity_penalties import PENALTIES, Penalty, Schedule, alpha_at
from d2dmoe_pl.moe.token_context import real_tokens
from d2dmoe_pl.moe.token_streams import TokenIndices
from d2dmoe_pl.phases._optimized_phase import OptimizedPhase, freeze_
from d2dmoe_pl.phases._repeated_layers import mean_over_runs
from d2dmoe_pl.phases._teacher import Teacher

DEFAULT_PROJECTIONS: list[Role] = list(ROLES)


class AttentionDistillation(OptimizedPhase):
    """Replace attention projections by 2-layer ReLU MLPs of their cost: D2DMoE (arXiv 2310.04361), section 3.5.

    Each MLP learns, by mean squared error, to give what its projection gives in the model as it came, on that model's
    inputs; everything else stays as it is. The loss is ``mean over projections of the error + alpha * mean over
    projections of the sparsity penalty`` of the hidden activations. It goes after fine-tuning, and before sparsity
    enforcement and clustering, which then take the MLPs for further FFNs. A fused projection of queries, keys and
    values is taken apart first.

    Args:
        projections: Which to replace, of ``query``, ``key``, ``value`` and ``output``.
        width: Hidden neurons of an MLP; as many as cost no more than the projection if not given.
        multiple_of: What that width is rounded down to a multiple of, so that it can be split into so many experts.
        residual: Add an MLP's input to its output, where they are of one width.
        penalty: ``l1``, the sum of magnitudes; ``hoyer``, its square over the sum of squares.
        alpha: Weight of the penalty at its largest.
        schedule: How the weight grows: ``constant``; ``linear`` to the end; ``warmup``, linear to half-way.
        kwargs: As for :class:`d2dmoe_pl.phases.OptimizedPhase`.

    Raises:
        ConfigError: For no or unknown ``projections``, numbers that are not positive, or a negative ``alpha``.
    """

    def __init__(
        self,
        projections: list[Role] = DEFAULT_PROJECTIONS,
        width: int | None = None,
        multiple_of: int = 8,
        residual: bool = False,
        penalty: Penalty = "hoyer",
        alpha: float = 1e-3,
        schedule: Schedule = "linear",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check(
            bool(projections) and set(projections) <= set(ROLES),
            f"projections={projections}: must be at least one of {', '.join(ROLES)}",
        )
        check(alpha >= 0, f"alpha={alpha}: must not be negative")
        self.roles = set(projections)
        self.config = ProjectionConfig(width, multiple_of, residual)
        self.penalty = penalty
        self.alpha = alpha
        self.schedule = schedule
        self._original: Teacher | None = None

    def transform_(self, model: nn.Module) -> None:
        self._original = Teacher(_same_tensors(model))
        replace_projections_(model, self.config, self._is_replaced)
        freeze_(model, trained=list(projection_mlps(model).values()))

    def configure_model(self) -> None:
        was_made = self.is_made
        super().configure_model()
        if self.is_fitting and not was_made:
            assert self._original is not None
            self._original.prepare(self)

    def on_fit_start(self) -> None:
        assert self._original is not None
        self._original.to(self.device)
        self._projections = select_projections(self._original.model, self._is_replaced)
        self._mlps = projection_mlps(self.model)
        self._ffns = projection_ffns(self.model)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        errors, relative, penalties = self._imitate(batch)
        error, penalty = torch.stack(list(errors.values())).mean(), torch.stack(penalties).mean()
        alpha = alpha_at(self.alpha, self.schedule, self.progress())
        loss = error + alpha * penalty
        mean = torch.stack(list(relative.values())).mean()
        self.log_dict({"train/loss": loss, "train/relative_error": mean}, prog_bar=True)
        self.log_dict({"train/squared_error": error, "train/penalty": penalty, "train/alpha": alpha})
        self.log_by_layer("relative_error", relative)
        return loss

    def _is_replaced(self, projection: Projection, name: str) -> bool:
        return projection.role in self.roles

    def _imitate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
        """The squared and relative error of each MLP, and their penalties, from one pass of the original model.

        What is kept for the backward pass is what training the MLPs inside the model would keep of them.
        """
        indices = TokenIndices(self.model, batch)
        errors: defaultdict[str, list[Tensor]] = defaultdict(list)
        relative: defaultdict[str, list[Tensor]] = defaultdict(list)
        penalties: list[Tensor] = []

        def penalise(name: str, pre: Tensor, post: Tensor) -> None:
            penalties.append(PENALTIES[self.penalty](post).mean())

        def learn(name: str, inputs: Tensor, target: Tensor) -> None:
            tokens, goal = (
                real_tokens(values.flatten(0, -2), indices(name)) for values in (inputs, target)
            )  # (N, ...)
            with torch.enable_grad():
                error = F.mse_loss(self._mlps[name](tokens).float(), goal.float())
            errors[name].append(error)
            relative[name].append((error.detach() / goal.float().square().mean()).sqrt())

        assert self._original is not None
        watched = _watched(self._original.model, self._projections, learn)
        with watched_activations(self._ffns, penalise), watched:
            self._original.run_layers(batch)
        return mean_over_runs(errors), mean_over_runs(relative), penalties


def _same_tensors(model: nn.Module) -> nn.Module:
    """A model of its own modules but the very parameters and buffers of ``model``."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _watched(
    model: nn.Module, projections: Sequence[Projection], observer: Callable[[str, Tensor, Tensor], None]
) -> AbstractContextManager[None]:
    """Call ``observer(name, input, output)`` for each of ``projections`` that runs in the body."""

    def register(projection: Projection) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            observer(projection.name, args[0], projection.part_of(output))

        return model.get_submodule(projection.place).register_forward_hook(hook)

    return hooked(register(projection) for projection in projections)
