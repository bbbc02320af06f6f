"""The layer that stands where a dense FFN stood."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.errors import ConfigError, said_of
from d2dmoe_pl.moe.cutoffs.cutoffs import Cutoffs, cut, work_of_pairs
from d2dmoe_pl.moe.execution._eligibility import is_watched_by_itself
from d2dmoe_pl.moe.execution._whole_layer import run_whole
from d2dmoe_pl.moe.expert_layer import ExpertLayer
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.gating import Gate
from d2dmoe_pl.moe.gating._ordered import Order
from d2dmoe_pl.moe.gating._straight_through import straight_through
from d2dmoe_pl.moe.routers import Router
from d2dmoe_pl.moe.stand_ins.stand_in import StandIn
from d2dmoe_pl.moe.token_context import TokenContext, is_recorded, run_on_real_tokens


class MoELayer(ExpertLayer):
    """Experts, and once there are a router and a gate, a per-token choice among them.

    Without a router or a gate every expert runs and the layer is the dense FFN it was made from.

    Args:
        experts: The dense FFN's neurons.
        context: Of the model; says which tokens are padding.
        output_dropout: What the dense FFN applied to its output.

    Attributes:
        router: Scores the experts of each token; None until there is one.
        gate: Turns scores into a choice; None to run every expert.
        stand_in: Gives about what the skipped experts would have; None for nothing.
        cutoffs: What the experts that run leave out of their products; None for nothing.
        observer: Called with ``(tokens (N, d_model), hidden (N, E, s))``, the activations of all experts, whichever of
            them the gate admits. How routers get inputs and targets from the pass that the model makes anyway.
        softness: Where routers learn from what the chosen experts are worth, see :func:`learned_choices`; else None.
    """

    experts: Experts
    router: Router | None
    gate: Gate | None
    stand_in: StandIn | None
    cutoffs: Cutoffs | None
    output_dropout: nn.Module

    def __init__(self, experts: Experts, context: TokenContext, output_dropout: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.router = None
        self.gate = None
        self.stand_in = None
        self.cutoffs = None
        self.output_dropout = output_dropout
        self.context = context
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        self.softness: float | None = None
        self._work_observers: dict[int, Callable[[Tensor], object]] = OrderedDict()

    @property
    def sizes(self) -> Experts:
        return self.own_experts

    @property
    def own_experts(self) -> Experts:
        """The experts, also where something else stands around them, such as what adapts their weights (PEFT)."""
        experts: Any = self.experts
        if isinstance(experts, Experts):
            return experts
        return next(module for module in experts.modules() if isinstance(module, Experts))

    def with_experts(self, function: Callable[[Experts, Tensor], Tensor], values: Tensor) -> Tensor:
        """``function(experts, values)``, with weights as the layer runs on: what stands around them may adapt them."""
        experts: Any = self.experts
        return function(experts, values) if isinstance(experts, Experts) else experts(values, instead=function)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_model)`` to ``(..., d_out)``, mostly the same; rows of padding come out as zeros.

        Compiled, exported, traced or on a GPU, shapes depend on those of ``x`` alone, whatever is padding. Elsewhere,
        and where gradients are wanted, parts that run one after the other are given real tokens only.
        """
        parts = self._modules  # nn.Module's own lookup, a dozen times a layer, takes as long as a token's products
        experts: Any = parts["experts"]
        router: Any = parts.get("router")
        gate: Any = parts.get("gate")
        stand_in: Any = parts.get("stand_in")
        dropout: Any = parts["output_dropout"]
        is_own = isinstance(experts, Experts)  # nothing stands around them
        real = self.context.real
        if real is not None and not is_recorded() and len(real) * x.shape[-1] != x.numel():
            raise ValueError(
                f"attention_mask of {len(real)} positions: must be of as many as reach the MoE layers, which "
                f"{x.numel() // x.shape[-1]} do; the model adds or drops some inside, and padding is not known there"
            )
        is_plain = is_own and self.softness is None and not self._is_observed()
        whole = run_whole(experts, router, gate, stand_in, parts.get("cutoffs"), x, real) if is_plain else None
        if whole is not None:
            output = whole
        else:
            positions = x.reshape(-1, x.shape[-1])  # (P, d)
            output = self._run_parts(positions, real)  # (P, d_out)
            output = output.view(*x.shape[:-1], output.shape[1])
        return output if _drops_nothing(dropout) else dropout(output)

    def watch(self, observer: Callable[[Tensor], object]) -> RemovableHandle:
        def hook(gate: nn.Module, args: tuple[Tensor], mask: Tensor) -> None:  # a hook's value would replace the mask
            observer(self.at_tokens(mask))

        return self.get_gate().register_forward_hook(hook)

    def watch_work(self, observer: Callable[[Tensor], object]) -> RemovableHandle:
        if self.cutoffs is None:
            return super().watch_work(observer)
        handle = RemovableHandle(self._work_observers)
        self._work_observers[handle.id] = observer
        return handle

    def hidden_at(self, gate: Gate, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """All experts' activations at a gate's setting, ``(N, E, s)``, and the work of each pair, ``(N, E)``.

        The setting decides what is left out of both; where there are no cutoffs, a pair's work is 1, and not told.
        """
        if self.cutoffs is None:
            return self.with_experts(lambda experts, given: experts.hidden(given), tokens), None
        least = self.cutoffs(gate, self.own_experts.num_experts)
        hidden = self.with_experts(lambda experts, given: experts.hidden(given, least[2]), cut(tokens, least[0]))
        return cut(hidden, least[1]), work_of_pairs(self.own_experts, tokens, hidden, least)

    def work_shares(self, taus: Sequence[float], chosen: Tensor) -> list[float]:
        """About what share of all experts' FLOPs is left at each of ``taus``, at which a rule chooses these shares."""
        if self.cutoffs is None:
            return chosen.tolist()
        left = [self.cutoffs.work_share(tau, self.own_experts.is_gated) for tau in taus]
        return [
            share * (1.0 if tau > self.all_above else run)
            for tau, share, run in zip(taus, left, chosen.tolist(), strict=True)
        ]

    @property
    def all_above(self) -> float:
        """The gate's ``tau`` above which every expert runs: with cutoffs, where these do not count in full yet."""
        return 1.0 if self.cutoffs is None else self.cutoffs.config.full_tau

    def choose(self, scores: Tensor, gate: nn.Module | None = None, **order: Order) -> Tensor:
        """The experts of each token, boolean ``(N, E)``, by their scores, at the gate's setting or another's."""
        gate = self.gate if gate is None else gate
        assert gate is not None
        is_own = isinstance(gate, Gate)  # nothing stands in its place, which decides by itself
        return gate(scores, self.all_above, **order) if is_own and self.cutoffs is not None else gate(scores, **order)

    def at_tokens(self, rows: Tensor) -> Tensor:
        """What a gate was given, or gave, of a call that runs, without the rows of padding that there may be."""
        real = self.context.real
        return rows if real is None or len(rows) < len(real) else rows[real]

    def flops_beside_experts(self, tokens: int, samples: int) -> int:
        """FLOPs of the router and the stand-in: none at a setting at which every expert runs, where both are idle."""
        if self._admits_all():
            return 0
        return tokens * sum(part.flops() for part in (self.router, self.stand_in) if part is not None)

    def describe(self) -> dict[str, Any]:
        return {
            "num_experts": self.own_experts.num_experts,
            "backend": self.own_experts.backend,
            "router": None if self.router is None else asdict(self.router.config),
            "gate": None if self.gate is None else asdict(self.gate.config),
            **({} if self.stand_in is None else {"stand_in": asdict(self.stand_in.config)}),
            **({} if self.cutoffs is None else {"cutoffs": self.cutoffs.config.described()}),
        }

    def get_router(self) -> Router:
        """The router, where there is known to be one."""
        assert self.router is not None
        return self.router

    def score(self, tokens: Tensor) -> Tensor:
        """What the router scores tokens ``(N, d_model)``, ``(N, E)``."""
        router: Any = self.router
        if getattr(router, "reads_experts", False):
            return self.with_experts(lambda experts, given: router(given, experts), tokens)
        scores: Tensor = router(tokens)
        return scores

    def get_gate(self) -> Gate:
        """The gate, where there is known to be one."""
        assert self.gate is not None
        return self.gate

    def _run_parts(self, positions: Tensor, real: Tensor | None) -> Tensor:
        """Positions ``(P, d_model)``, of which ``real``, ``(P,)``, says what is no padding, to ``(P, d_out)``."""
        if real is None:
            return self._run_tokens(positions)
        is_static = positions.device.type != "cpu" and not torch.is_grad_enabled()
        if self._is_observed() or not (is_recorded() or is_static):
            return run_on_real_tokens(self._run_tokens, positions, self.context.token_index)
        return torch.where(real.unsqueeze(1), self._run_tokens(positions, real), 0)

    def _run_tokens(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """Tokens ``(N, d_model)``, of which those not ``real`` run no expert, to ``(N, d_out)``."""
        if self.router is None or self.gate is None or self._needs_no_scores(self.router, self.gate):
            return self._run_experts(tokens, None)
        scores = self.score(tokens)
        if isinstance(self.router, Router):  # where masks are given, nothing is scored
            self._check_scores(scores, tokens)
        mask = self.choose(scores)  # (N, E)
        if real is not None:
            mask = mask & real.unsqueeze(1)
        output = self._run_experts(tokens, mask, None if self.softness is None else self._learned(scores, mask))
        return output if self.stand_in is None else output + self.stand_in(tokens, scores, mask)

    def _check_scores(self, scores: Any, tokens: Tensor) -> None:
        """Raise ``ConfigError`` unless a router, which may be anybody's, has scored each token: others would spread."""
        shape = (tokens.shape[0], self.own_experts.num_experts)  # len() would fix the number where it is exported
        if not isinstance(scores, Tensor) or scores.shape != shape or scores.device != tokens.device:
            raise ConfigError(
                f"router={self.get_router().config.kind!r}: gave {said_of(scores)}; must be scores of shape {shape} on "
                f"{tokens.device}, of each token and each expert"
            )

    def _admits_all(self) -> bool:
        return isinstance(self.gate, Gate) and self.gate.admits_all(self.own_experts.num_experts, self.all_above)

    def _needs_no_scores(self, router: nn.Module, gate: nn.Module) -> bool:
        """Whether nothing is to be chosen in this call, nor learnt or seen by anybody, nor recorded for other settings.

        What is trained has every router take part in every step, which DDP insists on.
        """
        if torch.is_grad_enabled() or is_recorded() or self._is_observed() or not self._admits_all():
            return False
        return not any(map(is_watched_by_itself, filter(None, (router, gate, self.stand_in))))

    def _is_observed(self) -> bool:
        return self.observer is not None or bool(self._work_observers)

    def _run_experts(self, tokens: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> Tensor:
        """Tokens ``(N, d_model)``, with a mask and, where they differ, weights of it, ``(N, E)``, to ``(N, d_out)``."""
        least = None  # of what is not left out
        if self.cutoffs is not None and self.router is not None and self.gate is not None:
            least = self.cutoffs(self.get_gate(), self.own_experts.num_experts)
        given = tokens if least is None else cut(tokens, least[0])
        if weights is None and not self._is_observed():
            return self.experts(given, mask) if least is None else self.experts(given, mask, *least[1:])
        chosen = mask if weights is None else weights

        def run(experts: Experts, given: Tensor) -> Tensor:
            hidden = experts.hidden(given, None if least is None else least[2])  # (N, E, s)
            if self.observer is not None:
                self.observer(tokens, hidden)
            if least is not None and mask is not None:
                for observer in self._work_observers.values():
                    observer((work_of_pairs(experts, tokens, hidden, least) * mask).double().sum(dim=1))
                hidden = cut(hidden, least[1])
            return experts.combine(hidden if chosen is None else hidden * chosen.unsqueeze(-1))

        return self.with_experts(run, given)

    def _learned(self, scores: Tensor, mask: Tensor) -> Tensor:
        assert self.softness is not None
        return straight_through(scores, mask, self.softness).to(self.own_experts.up_weight.dtype)


def _drops_nothing(dropout: nn.Module) -> bool:
    """Whether a call of it, which takes as long as a token's products, can be left out."""
    is_known = type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)
    return is_known and not (dropout._forward_hooks or dropout._forward_pre_hooks or dropout._backward_hooks)


@contextmanager
def learned_choices(layers: Mapping[str, MoELayer], softness: float) -> Iterator[None]:
    """Let gradients reach the routers of ``layers`` through their gates; see :func:`straight_through`."""
    for layer in layers.values():
        layer.softness = softness
    try:
        yield
    finally:
        for layer in layers.values():
            layer.softness = None


@contextmanager
def observed(layers: Mapping[str, MoELayer], observer: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``observer(name, tokens, hidden)`` for every layer that runs in the body; see :class:`MoELayer`."""
    for name, layer in layers.items():
        layer.observer = partial(observer, name)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.observer = None
