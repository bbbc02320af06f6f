"""A hook on what is replaced would be lost, and is refused; others stay."""

import pytest
import tiny
import torch

from d2dmoe_pl import ExpertsConfig, ProjectionConfig, convert_to_moe_, merge_to_dense_, replace_projections_
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.moe.lost_hooks import replaced_modules

KINDS = {
    "register_forward_hook": lambda module, args, output: 2 * output,
    "register_forward_pre_hook": lambda module, args: None,
    "register_full_backward_hook": lambda module, given, gave: None,
}
EVERY = [kind for kind in tiny.TASKS if "-" not in kind]


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize(
    "kind", ["bert", "timm_vit", "gpt2-causal-language-modeling", "llama-causal-language-modeling"]
)
def test_a_hook_on_what_goes_is_refused(kind, how):
    model = tiny.dense(kind)
    for name, module in replaced_modules(model, select_ffns(model)).items():
        handle = getattr(module, how)(KINDS[how])
        with pytest.raises(ConfigError) as error:
            convert_to_moe_(model, ExpertsConfig(num_experts=4))
        said = "has hooks, which nothing would call once it is replaced; must be removed before, and registered on what"
        assert str(error.value) == f"{name}: {said} stands there then"
        assert not moe_layers(model)
        handle.remove()
    convert_to_moe_(model, ExpertsConfig(num_experts=4))


@pytest.mark.parametrize("kind", EVERY)
def test_a_hook_on_what_stays_is_called(kind):
    model, batch = tiny.dense(kind).eval(), tiny.batch(kind)
    gone = {id(module) for module in replaced_modules(model, select_ffns(model)).values()}
    called = []
    stays = {name: module for name, module in model.named_modules() if name and id(module) not in gone}
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name)) for name, module in stays.items()
    ]
    tiny.logits(model, batch)
    before = [name for name in called if "act" not in name]  # experts call their activations themselves
    called.clear()
    convert_to_moe_(model, ExpertsConfig(num_experts=4))
    tiny.logits(model, batch)
    assert set(before) - set(called) <= {name for name in before if ".drop" in name or name.endswith("dropout")}
    for handle in handles:
        handle.remove()


def test_in_other_changes():
    model = tiny.routed("bert")
    layer = next(iter(moe_layers(model).values()))
    handle = layer.register_forward_hook(KINDS["register_forward_hook"])
    with pytest.raises(ConfigError, match="has hooks, which nothing would call once it is replaced"):
        merge_to_dense_(model)
    handle.remove()
    merge_to_dense_(model)
    model.bert.encoder.layer[1].attention.output.dense.register_forward_hook(KINDS["register_forward_hook"])
    with pytest.raises(ConfigError, match=r"^bert\.encoder\.layer\.1\.attention\.output\.dense: has hooks"):
        replace_projections_(model, ProjectionConfig(multiple_of=4))
    assert torch.isfinite(tiny.logits(model, tiny.batch("bert"))).all()
