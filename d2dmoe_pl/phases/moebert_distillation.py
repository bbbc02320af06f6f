"""Make experts of the important neurons, and train them to do as the dense model does."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moe.token_context import token_index
from d2dmoe_pl.moebert.conversion import convert_to_moebert_, set_hash_table_
from d2dmoe_pl.moebert.distillation import hidden_state_loss, share_fixed_
from d2dmoe_pl.moebert.layer import MoEBERTConfig, moebert_layers
from d2dmoe_pl.moebert.published_files import read_hash_list, read_importance
from d2dmoe_pl.moebert.routing import ROUTINGS, Decision, balanced_table
from d2dmoe_pl.phases._optimized_phase import OptimizedPhase
from d2dmoe_pl.phases._phase import Phase
from d2dmoe_pl.phases._teacher import Teacher, check_taught, described_teacher, read_teacher
from d2dmoe_pl.phases.importance_scoring import IMPORTANCE


class MoEBERTDistillation(OptimizedPhase):
    """Experts from importance, distilled from the dense model: MoEBERT (arXiv 2204.07675).

    The loss is the task's ``+ beta * (sum over embeddings and layers of the mean squared error between the student's
    and the teacher's hidden states + the distance of their predictions) + gamma * mean over layers of the balance
    loss``. The teacher is frozen and runs forward once a step, without gradients; with ``beta`` 0 there is none.

    Args:
        num_experts: ``E``.
        expert_dim: Neurons of an expert.
        num_shared: How many of them, the most important ones, every expert has.
        routing: ``hash_random``, ``hash_balance``, ``gate_token``, ``gate_sentence`` or another that is known.
        beta: Weight of the distillation.
        gamma: Weight of the load-balancing loss, for the routings with a gate.
        expert_dropout: On each expert's output.
        seed: Of random hash tables.
        teacher: Artifact folder of a dense model; that of ``init_from`` if not given.
        importance_file: Published ``importance_*.pkl``, instead of the scores in the artifact of ``init_from``; of
            several, as one for each process, scores are summed.
        hash_list_file: Published hash list, a pickle, instead of a table made here.
        kwargs: As for :class:`d2dmoe_pl.phases.OptimizedPhase`.

    Raises:
        ConfigError: For numbers out of range, more shared neurons than an expert holds, or an unknown routing.
    """

    ends_at = "routed"

    def __init__(
        self,
        num_experts: int = 4,
        expert_dim: int = 768,
        num_shared: int = 512,
        routing: str = "hash_random",
        beta: float = 5.0,
        gamma: float = 0.0,
        expert_dropout: float = 0.1,
        seed: int = 0,
        teacher: str | None = None,
        importance_file: str | list[str] | None = None,
        hash_list_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = MoEBERTConfig(num_experts, expert_dim, num_shared, routing, expert_dropout, seed)
        check(beta >= 0, f"beta={beta}: must not be negative")
        check(gamma >= 0, f"gamma={gamma}: must not be negative")
        self.beta = beta
        self.gamma = gamma
        self.teacher = teacher
        self.importance_file = importance_file
        self.hash_list_file = hash_list_file
        self._importance: dict[str, Tensor] | None = None  # by FFN, once the artifact to start from is there
        self._teacher: Teacher | None = None

    def check_start(self, stage: str, came_from: str, beside: Collection[str]) -> None:
        super().check_start(stage, came_from, beside)
        check(
            self.importance_file is not None or IMPORTANCE in beside,
            f"init_from={self.init_from!r}: is the work of {came_from}, without importance scores; MoEBERTDistillation "
            "starts from ImportanceScoring, or needs importance_file",
        )

    def transform_(self, model: nn.Module) -> None:
        self._check_teacher(model)
        importance = self._importance
        if self.importance_file is not None:
            importance = self._published_importance(model)
        convert_to_moebert_(model, self.config, importance=importance)
        if self.hash_list_file is not None:
            set_hash_table_(model, read_hash_list(self.hash_list_file), f"hash_list_file={self.hash_list_file!r}")

    def configure_model(self) -> None:
        if self.is_made:
            return
        artifact = self.read_start(self.is_fitting)
        if self.is_fitting and artifact is not None and IMPORTANCE in artifact.tensors:
            self._importance = artifact.read_tensors(IMPORTANCE)
        super().configure_model()
        if self.is_fitting and self.beta > 0:
            path = self.teacher or self.init_from
            assert path is not None  # _check_teacher has seen to it
            self._teacher = read_teacher(self, path)

    def check_data(self, running: Phase) -> None:
        if self.beta > 0 and self.teacher is not None:
            check_taught(self.teacher, self.init_from, running.model)

    def on_fit_start(self) -> None:
        if self._teacher is not None:
            self._teacher.to(self.device)
            share_fixed_(self._teacher.model, self.model)
        routing = ROUTINGS.find(self.config.routing, "routing")
        if routing.needs_counts and self.hash_list_file is None:
            set_hash_table_(self.model, balanced_table(self._token_counts(), self.config.num_experts, self.config.seed))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with self._balance_losses() as balance_losses:
            logits, states = adapter_for(self.model).logits_and_hidden_states(self.model, batch)
        loss = task_loss = self.task_loss(logits, batch)
        parts = {"task_loss": task_loss}
        if self._teacher is not None:
            teacher_logits, teacher_states = self._teacher.logits_and_hidden_states(batch)
            check(
                teacher_logits.shape == logits.shape,
                f"teacher={self.teacher!r}: gives predictions of shape {tuple(teacher_logits.shape)}; must be "
                f"{tuple(logits.shape)}, as the student's",
            )
            index = token_index(batch.get("attention_mask"))
            parts["hidden_state_loss"] = hidden_state_loss(states, teacher_states, index)
            parts["prediction_loss"] = self.task.prediction_loss(logits, teacher_logits, batch)
            loss = loss + self.beta * (parts["hidden_state_loss"] + parts["prediction_loss"])
        if balance_losses:
            parts["balance_loss"] = torch.stack(balance_losses).mean()
            loss = loss + self.gamma * parts["balance_loss"]
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": part.detach() for name, part in parts.items()})
        return loss

    @contextmanager
    def _balance_losses(self) -> Iterator[list[Tensor]]:
        """The load-balancing losses of the layers that run in the body, of those that have one."""
        losses: list[Tensor] = []

        def hook(routing: nn.Module, args: tuple, decision: Decision) -> None:
            if decision.balance_loss is not None:
                losses.append(decision.balance_loss)

        with hooked(layer.routing.register_forward_hook(hook) for layer in moebert_layers(self.model).values()):
            yield losses

    def _check_teacher(self, student: nn.Module) -> None:
        """Raise ``ConfigError`` unless teacher and student have hidden states of the same number and width."""
        if self.beta == 0:
            return
        check(
            self.teacher is not None or self.init_from is not None,
            "teacher=None: must be the artifact of a dense model where the student starts from a source",
        )
        if self.teacher is None:
            return
        described = described_teacher(self.teacher, self.init_from, student)
        if described is None:
            return
        artifact, teacher = described
        where = f"teacher={self.teacher!r}"
        check(artifact.stage == "dense", f"{where}: is at stage {artifact.stage!r}; must be a dense model")
        shapes = []
        for model in (teacher, student):
            ffns = select_ffns(model)
            shapes.append((adapter_for(model).family, len(ffns), ffns[0].d_model))
        shown = ["a {} of {} layers of width {}".format(*shape) for shape in shapes]
        check(shapes[0] == shapes[1], f"{where}: is {shown[0]}; must be {shown[1]}, as the student is")

    def _published_importance(self, model: nn.Module) -> dict[str, Tensor]:
        assert self.importance_file is not None
        scores = read_importance(self.importance_file)
        ffns = select_ffns(model)
        check(
            len(scores) == len(ffns),
            f"importance_file={self.importance_file!r}: has {len(scores)} layers; must have the model's {len(ffns)}",
        )
        return {ffn.name: score for ffn, score in zip(ffns, scores, strict=True)}

    def _token_counts(self) -> Tensor:
        """How often each token id occurs in the training split, ``(vocabulary,)`` int64; the same on all processes."""
        data = self.data
        with data.in_order():
            loader = data.training_loader()
        dataset: Any = loader.dataset
        share = Subset(dataset, range(self.global_rank, len(dataset), self.trainer.world_size))
        batches = DataLoader(share, loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers)
        vocabulary_size = adapter_for(self.model).vocabulary_size(self.model)
        assert vocabulary_size is not None
        counts = torch.zeros(vocabulary_size, dtype=torch.int64)
        for batch in batches:
            mask = batch.get("attention_mask")
            ids = batch["input_ids"] if mask is None else batch["input_ids"][mask != 0]
            counts += torch.bincount(ids.flatten(), minlength=vocabulary_size)
        return self.trainer.strategy.reduce(counts.to(self.device), reduce_op="sum")
