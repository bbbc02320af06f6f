"""A model that is parted among processes while it is trained, block by block: FSDP2."""

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.moe.budgets.block_replay import block_of
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.find_layers import expert_layers
from d2dmoe_pl.moe.routers import Router

if TYPE_CHECKING:
    from d2dmoe_pl.phases._phase import Phase

FSDP2 = "fsdp2"  # what a trainer's strategy is called
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")  # others scale gradients, each process by itself


class FullyShardedStrategy(ModelParallelStrategy):
    """``trainer.strategy=fsdp2``: every process has a part of each parameter, and its own samples.

    Checkpoints are whole files, gathered tensor by tensor.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Let all processes share in the parameters, whatever machine they are on."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()


StrategyRegistry.register(FSDP2, FullyShardedStrategy, description="FSDP2, block by block", override=True)


def check_strategy(phase: "Phase", strategy: Strategy) -> None:
    """Raise ``ConfigError`` for a strategy that parts a model among processes where the phase cannot work so."""
    if not isinstance(strategy, (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)):
        return
    is_ours, is_deepspeed = isinstance(strategy, FullyShardedStrategy), isinstance(strategy, DeepSpeedStrategy)
    name = FSDP2 if is_ours else getattr(strategy, "strategy_name", None) or type(strategy).__name__
    check(
        phase.can_be_sharded,
        f"strategy={name}: {type(phase).__name__} needs the model whole in every process; must be auto or ddp",
    )
    check(is_ours or is_deepspeed, f"strategy={name}: must be {FSDP2}, which parts a model as phases can save it")
    trains_model = not phase.kept_whole and not phase.takes_samples_in_order
    check(
        is_ours or trains_model,
        f"strategy={name}: {type(phase).__name__} has no gradients of the model to share; must be auto, ddp or {FSDP2}",
    )
    precision = strategy.precision_plugin.precision if is_ours else None
    check(
        precision is None or precision in PRECISIONS,
        f"precision={precision}: must be one of {', '.join(PRECISIONS)} with strategy={FSDP2}",
    )
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        raise ConfigError(f"strategy={name}: must be of stage 1 or 2, or {FSDP2}; stage 3 parts the weights too")


def parts_models(strategy: Strategy | None) -> bool:
    """Whether a trainer of this strategy parts models among processes."""
    return isinstance(strategy, FullyShardedStrategy)


def shares_model(phase: "Phase") -> bool:
    """Whether ``phase`` has a trainer, and this parts its model among processes."""
    return phase._trainer is not None and parts_models(phase._trainer.strategy)


def shard_(model: nn.Module, phase: "Phase") -> None:
    """Part the parameters of ``model`` among processes, if the trainer of ``phase`` does so.

    Args:
        model: On the CPU or the device; on that, no more than a block is whole at a time.
        phase: In its trainer.
    """
    if not shares_model(phase):
        return
    kept_whole = [module for module in model.modules() if isinstance(module, phase.kept_whole)]
    shard_over_(model, *_mesh_and_type(phase), kept_whole)


def shard_layer_(layer: nn.Module, phase: "Phase") -> None:
    """The same of one layer, before :func:`shard_` does the rest of the model that it is in."""
    _fully_shard_(layer, *_mesh_and_type(phase))


@torch.no_grad()
def average_gradients_(phase: "Phase") -> None:
    """Let the parameters that every process has whole have the mean of all processes' gradients, before a step."""
    if not shares_model(phase):
        return
    for module in (each for each in phase.model.modules() if isinstance(each, phase.kept_whole)):
        for parameter in (each for each in module.parameters() if each.requires_grad):
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = phase.trainer.strategy.reduce(own, reduce_op="mean")


def _mesh_and_type(phase: "Phase") -> tuple[Any, torch.dtype | None]:
    """The processes that a model is parted among, and what a block's parameters are cast to as they become whole."""
    check(
        phase.task.most_written == 0,
        f"strategy={FSDP2}: allowed only where no answers are written, which takes processes different numbers of "
        "steps; must be ddp",
    )
    strategy: Any = phase.trainer.strategy
    mixed = strategy.precision_plugin.precision == "bf16-mixed"
    return strategy.device_mesh["data_parallel"], torch.bfloat16 if mixed else None


def shard_over_(
    model: nn.Module, mesh: Any, gathered_in: torch.dtype | None = None, kept_whole: Sequence[nn.Module] = ()
) -> None:
    """Part the parameters of ``model`` over the processes of a ``DeviceMesh``, those of each block together.

    Args:
        model: The model.
        mesh: Of one dimension.
        gathered_in: What a block's parameters are cast to as they become whole, and it computes in; their own type if
            not given. Autocast would do so to whole ones, and keep every copy for the backward pass.
        kept_whole: Modules that every process is to have whole.
    """
    layers = [*(ffn.name for ffn in adapter_for(model).ffns(model)), *expert_layers(model)]
    names = dict.fromkeys(name for name in (block_of(layer, model) for layer in layers) if name is not None)
    for part in dict.fromkeys([*(model.get_submodule(name) for name in names), model]):
        _fully_shard_(part, mesh, gathered_in, kept_whole)
    for module in model.modules():
        if isinstance(module, (Experts, Router)) and module not in kept_whole:
            module.is_gathered = True


def _fully_shard_(
    module: nn.Module, mesh: Any, gathered_in: torch.dtype | None, kept_whole: Sequence[nn.Module] = ()
) -> None:
    original = type(module)
    ignored = {parameter for kept in kept_whole for parameter in kept.parameters()}
    # after each pass, of the outermost module too: what reads or sets parameters between steps finds them all sharded
    fsdp = resolve_name("torch.distributed.fsdp")
    policy = fsdp.MixedPrecisionPolicy(param_dtype=gathered_in, reduce_dtype=gathered_in and torch.float32)
    fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=ignored)
    made = type(module)  # a subclass of the original, whose name is what artifacts and messages say
    made.__name__, made.__qualname__, made.__module__ = (
        original.__name__,
        original.__qualname__,
        original.__module__,
    )
