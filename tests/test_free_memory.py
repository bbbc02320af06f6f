"""A model that is larger than the memory that is free is refused before it is loaded."""

import pytest
import tiny
import torch
import transformers
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from d2dmoe_pl import free_memory as module
from d2dmoe_pl.adapters import HuggingFaceModel, TimmModel
from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.data import DatasetSource, LanguageModeling
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.free_memory import check_fits, free_memory
from d2dmoe_pl.phases import FineTuning
from d2dmoe_pl.phases._preflight import preflight
from d2dmoe_pl.phases._sharding import FullyShardedStrategy

MEMINFO = "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:    2000 kB\nSwapFree:   500 kB\nHugePages_Total:   0\n"


@pytest.fixture
def free(tmp_path, monkeypatch):
    """Sets what the system says of its memory."""

    def set_to(meminfo=None, **group):
        if meminfo is not None:
            (tmp_path / "meminfo").write_text(meminfo)
        for name, value in group.items():
            (tmp_path / f"memory.{name}").write_text(value)
        monkeypatch.setattr(module, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(module, "GROUP", tmp_path)

    return set_to


def test_what_the_system_says(free):
    free()
    assert free_memory() is None
    free(MEMINFO)
    assert free_memory() == 2500 * 1024
    free(MEMINFO, max="max\n", current="10\n", stat="anon 1\ninactive_file 2\n")
    assert free_memory() == 2500 * 1024
    free(MEMINFO, max="1000\n", current="400\n", stat="anon 1\ninactive_file 50\nactive_file 7\n")
    assert free_memory() == 650
    free("nothing")
    assert free_memory() is None


def test_what_weights_need(free):
    free(MEMINFO, max="400\n", current="0\n", stat="inactive_file 0\n")
    layer = nn.Linear(9, 10, device="meta", dtype=torch.bfloat16)
    check_fits(layer, "name='x'")
    check_fits(layer, "name='x'", torch.float32)
    free(max="399\n")
    check_fits(layer, "name='x'", torch.bfloat16)
    message = "name='x': needs 0.0 GB of memory for its weights; must be at most the 0.0 GB that are free"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        check_fits(layer, "name='x'", torch.float32)


def test_what_is_not_known_is_not_refused(free):
    free()
    check_fits(nn.Linear(10**6, 10**9, device="meta"), "name='x'")


def test_a_model_that_no_machine_has_room_for():
    config = tiny.decoder_config(transformers.LlamaConfig, num_hidden_layers=1, vocab_size=10**14)
    message = r"^config, dtype='bfloat16': needs 96[0-9]{5}.[0-9] GB of memory for its weights; must be at most the \d"
    with pytest.raises(ConfigError, match=message):
        HuggingFaceModel("causal-language-modeling", config=config, dtype="bfloat16").build([])


def test_it_is_told_before_the_data_is_read(tmp_path):
    config = tiny.decoder_config(transformers.LlamaConfig, num_hidden_layers=1, vocab_size=10**14)
    phase = FineTuning(source=HuggingFaceModel("causal-language-modeling", config=config))
    data = LanguageModeling(DatasetSource(train="nowhere.txt", validation=None, test=None), "nowhere")
    with pytest.raises(ConfigError, match=r"^source: needs 192[0-9]{5}.[0-9] GB of memory for its weights; must be"):
        preflight([phase], [data])


def test_each_way_to_load_one(free, tmp_path):
    transformers.BertModel(tiny.bert_config()).save_pretrained(tmp_path / "pretrained")
    save_artifact(tiny.dense("bert"), tmp_path / "artifact")
    free(MEMINFO.replace("2000", "1").replace("500", "0"))
    with pytest.raises(ConfigError, match=r"^name='.*pretrained', dtype='float32': needs 0.0 GB of memory"):
        HuggingFaceModel("text-classification", str(tmp_path / "pretrained")).build(["a", "b"])
    with pytest.raises(ConfigError, match=r"^architecture='vit_tiny_patch16_224': needs 0.0 GB of memory for"):
        TimmModel("vit_tiny_patch16_224", embed_dim=12, depth=1, num_heads=1).build(["a", "b"])
    with pytest.raises(ConfigError, match=r"^path='.*artifact', dtype=None: needs 0.0 GB of memory for its weights"):
        load_model(tmp_path / "artifact")
    with pytest.raises(ConfigError, match=r"^path='.*artifact', dtype='bfloat16': needs 0.0 GB of memory"):
        load_model(tmp_path / "artifact", dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"^path='.*artifact', dtype='bfloat16': needs 0.0 GB of memory"):
        load_model(tmp_path / "artifact", dtype="bfloat16", mapped=True)  # cast, its weights are no pages any more


def test_pages_of_files_need_none(free, tmp_path):
    model = tiny.dense("bert")
    save_artifact(model, tmp_path / "artifact")
    free(MEMINFO.replace("2000", "1").replace("500", "0"))
    read = load_model(tmp_path / "artifact", mapped=True)
    torch.testing.assert_close(read.state_dict(), model.state_dict(), rtol=0, atol=0)
    phase, data = FineTuning(init_from=str(tmp_path / "artifact")), tiny.TextData(4)
    preflight([phase], [data], FullyShardedStrategy())
    for strategy in (None, DDPStrategy()):
        with pytest.raises(ConfigError, match=r"^init_from='.*artifact': needs 0.0 GB of memory for its weights"):
            preflight([phase], [data], strategy)
