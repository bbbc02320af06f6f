"""Phase 3: split each FFN's neurons into experts. Trains nothing."""

from collections.abc import Hashable, Mapping
from typing import Literal

import torch
from rich.progress import track
from torch import Tensor, nn

from d2dmoe_pl.adapters import FFN, ModelSource, adapter_for
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_each_, convert_to_moe_
from d2dmoe_pl.moe.experts.activation_watching import watched_activations
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moe.splitting import SPLITS, CountedTokens, fired
from d2dmoe_pl.moe.splitting._several_ffns import split_each
from d2dmoe_pl.phases._ordered_pass import OrderedPass
from d2dmoe_pl.phases._sharding import shard_, shard_layer_, shares_model
from d2dmoe_pl.phases._teacher import on_same_memory


class ExpertClustering(OrderedPass):
    """Split every FFN into experts of equal size; the model computes the same function afterwards.

    Statistics, where the split needs them, are summed over processes; the clustering is done by the first and
    broadcast. The result depends neither on the batch size nor on the number of processes.

    Args:
        num_experts: ``E``; must divide the width of every FFN.
        split: Name of a split, e.g. of a file in ``moe/splitting``: ``activation`` (neurons that fire for the same
            tokens), ``coactivation`` (the co-activation graph of MoEfication), ``parameter`` (neurons with similar
            weights, as in both papers) or ``random``. Where an activation function gives no exact zeros, the quarter of
            a token's neurons with the largest activations counts as firing.
        num_samples: Training samples that activations are gathered from; some 16k tokens are enough.
        profile_dim: Dimensions that the profile of ``activation`` is projected to.
        seed: Of the clustering and the projection.
        num_projection_experts: ``E`` of MLPs that ``AttentionDistillation`` put in the place of attention projections;
            ``num_experts`` if not given.
        convert: ``ffns``, ``projections`` or ``all``: which of the two are split; the others stay dense.
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.
        source: A pretrained model, instead of ``init_from``.

    Raises:
        ConfigError: For an unknown split, or numbers that are not positive.
    """

    ends_at = "experts"
    can_be_sharded = True

    def __init__(
        self,
        num_experts: int,
        split: str = "activation",
        num_samples: int = 1024,
        profile_dim: int = 768,
        seed: int = 0,
        num_projection_experts: int | None = None,
        convert: Literal["all", "ffns", "projections"] = "all",
        init_from: str | None = None,
        source: ModelSource | None = None,
    ) -> None:
        super().__init__(init_from, source)
        self.config = ExpertsConfig(num_experts, num_projection_experts)
        self.convert = convert
        check(num_samples > 0, f"num_samples={num_samples}: must be positive")
        check(profile_dim > 0, f"profile_dim={profile_dim}: must be positive")
        self.split_name = split
        self.split = SPLITS.find(split, "split")
        self.num_samples = num_samples
        self.profile_dim = profile_dim
        self.seed = seed
        self._assignments: Mapping[str, Tensor] | None = None  # of neurons to experts, once they are known
        self._whole: list[nn.Module] = []  # the model before it was parted among processes, where it is

    def transform_(self, model: nn.Module) -> None:
        for ffn in select_ffns(model, self._is_converted):
            self.config.num_for(ffn)
        if not next(model.parameters()).is_meta and shares_model(self):
            self._whole = [on_same_memory(model)]

    def finish_(self, model: nn.Module) -> None:
        if not self._whole:
            convert_to_moe_(model, self.config, self._is_converted, assignments=self._assignments)
            return
        converted = self._whole.pop().eval()  # FSDP2 could not let go of the FFNs that it has parted
        for layer in convert_each_(converted, self.config, self._is_converted, self._assignments):
            shard_layer_(layer, self)
        shard_(converted, self)
        self.model = converted

    def begin(self) -> None:
        for model in self._whole:
            with adapter_for(model).exact_buffers(model):
                self.trainer.precision_plugin.convert_module(model)
        self._ffns = select_ffns(self.model, self._is_converted)
        nothing = CountedTokens((), self.profile_dim, self.seed, self.device)
        self._sums = {
            ffn.name: self.split.statistic(torch.zeros(0, ffn.d_ff, device=self.device), nothing)
            for ffn in self._ffns
            if self.split.needs_activations
        }

    def sums(self) -> Mapping[str, Tensor]:
        return self._sums

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        enough = not self.split.needs_activations or self.seen * self.trainer.world_size >= self.num_samples
        return -1 if enough else None  # -1 ends the epoch

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        counted: dict[Hashable, tuple[CountedTokens, Tensor]] = {}
        adapter, size = adapter_for(self.model), len(batch["labels"])
        seen, _ = adapter.in_order(batch)  # as the model is given it
        is_sparse = {ffn.name: ffn.is_sparse for ffn in self._ffns}

        def watch(name: str, pre: Tensor, post: Tensor) -> None:
            mask = adapter.padding_mask(self.model, name, seen)
            positions = torch.Size((size, post.shape[:-1].numel() // size))  # (B, L)
            if (id(mask), positions) not in counted:
                counted[id(mask), positions] = self._counted(mask, positions)
            tokens, index = counted[id(mask), positions]
            with torch.autocast(post.device.type, enabled=False):  # sums of integers stay exact
                firing = fired(post.flatten(0, -2)[index], is_sparse[name])  # (N, d_ff)
                self._sums[name] += self.split.statistic(firing, tokens)

        with watched_activations(self._ffns, watch):
            self.run_layers(batch)
        self.advance(size)

    def conclude(self) -> None:
        self._assignments = self._assign()
        self._ffns = []  # dense FFNs that are kept would be there beside their experts

    def _is_converted(self, ffn: FFN, name: str) -> bool:
        return self.convert == "all" or ffn.is_projection == (self.convert == "projections")

    def _counted(self, attention_mask: Tensor | None, positions: torch.Size) -> tuple[CountedTokens, Tensor]:
        """The tokens that count, and their places ``(N,)`` among all ``B * L`` positions."""
        mask = torch.ones(positions) if attention_mask is None else attention_mask.cpu()
        samples, places = [], torch.zeros(positions, dtype=torch.bool)
        for row, sample in enumerate(self.sample_numbers(positions[0]).tolist()):
            if sample < min(self.num_samples, self.num_training_samples):
                places[row] = mask[row] != 0
                samples.append((sample, int(places[row].sum())))
        tokens = CountedTokens(samples, self.profile_dim, self.seed, self.device)
        return tokens, places.flatten().nonzero().squeeze(1).to(self.device)

    def _assign(self) -> dict[str, Tensor]:
        """The expert of every neuron, by FFN; the same on all processes."""
        sums = {
            name: self.trainer.strategy.reduce(statistic, reduce_op="sum") for name, statistic in self._sums.items()
        }
        assignments: dict[str, Tensor] = {}
        if self.trainer.is_global_zero:
            ffns = select_ffns(self._whole[0], self._is_converted) if self._whole else self._ffns
            arguments = (
                (
                    ffn.input_weight.detach().cpu(),
                    sums[ffn.name].cpu() if ffn.name in sums else None,
                    self.config.num_for(ffn),
                    self.seed,
                )
                for ffn in ffns
            )
            given = split_each(self.split, arguments, len(ffns))
            is_quiet = not self.trainer.progress_bar_callback
            shown = track(given, "Clustering neurons", len(ffns), disable=is_quiet)
            assignments = {ffn.name: assignment for ffn, assignment in zip(ffns, shown, strict=True)}
        return self.trainer.strategy.broadcast(assignments)
