"""Small local things in place of those that recipes take from the hub: models, and files with the hub's columns."""

import json

import tiny
import transformers
from PIL import Image
from safetensors.torch import save_file

from d2dmoe_pl.adapters import TimmModel
from d2dmoe_pl.data.image_preprocessing import ImagePreprocessing

WORDS = ["who", "is", "it", "?", "red", "green", "blue", "cat", "dog", "eel", "fox", "gnu"]
ANIMALS, COLOURS = WORDS[7:], WORDS[4:7]
# appended to a command line that ends in --set: a chain that takes seconds
SMALL = [
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
    "data.init_args.batch_size=8",
    "data.init_args.max_length=16",
    "moebert_distillation.model.init_args.expert_dim=12",
    "moebert_distillation.model.init_args.num_shared=5",
]
SMALL_SQUAD = [*SMALL, "data.init_args.doc_stride=2", "data.init_args.max_question_length=4"]


# the same for the recipes of language models
SMALL_STREAM = [
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.precision=32-true",
    "trainer.accumulate_grad_batches=1",
    "trainer.enable_progress_bar=false",
    "data.init_args.length=8",
    "data.init_args.batch_size=4",
    "data.init_args.epoch_blocks=8",
    "data.init_args.evaluation_documents=5",
    "data.init_args.num_workers=0",
    "fine_tuning.trainer.max_steps=2",
    "sparsity_enforcement.trainer.max_steps=2",
    "router_regression.trainer.max_steps=2",
    "expert_clustering.model.init_args.num_experts=8",
]


TIMM_VIT = {**tiny.DIGITS_VIT, "in_chans": 3}
# the same for the recipes of classifiers
SMALL_CLASSIFIER = [
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.precision=32-true",
    "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=1",
    "trainer.enable_progress_bar=false",
    "data.init_args.batch_size=8",
    "data.init_args.num_workers=0",
    "expert_clustering.model.init_args.num_experts=8",
]
SMALL_SELECTION = [
    "expert_selection.model.init_args.k=2",
    "expert_selection.trainer.callbacks="
    '[{"class_path": "TauSweep", "init_args": {"rule": "topk", "ks": [1, 2, 4, 8]}}]',
]


SMALL_IMAGENET = [
    *SMALL_CLASSIFIER,
    *(f"fine_tuning.model.init_args.source.init_args.{key}={value}" for key, value in TIMM_VIT.items()),
    "data.init_args.image_size=8",
    "expert_clustering.model.init_args.num_projection_experts=4",
]


def write_imagenet(checkpoint, folder):
    """A pretrained timm ViT, and folders of images."""
    save_file(TimmModel("vit_base_patch16_224", **TIMM_VIT).build(ANIMALS[:3]).state_dict(), checkpoint)
    write_images(folder, {"train": 24, "validation": 6})


def write_emotion(folder, train=24):
    """Texts whose label is their animal."""
    folder.mkdir(exist_ok=True)
    for name, size in {"train": train, "validation": 10, "test": 10}.items():
        rows = [f"{phrase(i, 5)},{ANIMALS[i % 5]}\n" for i in range(size)]
        (folder / f"{name}.csv").write_text("".join(["text,label\n", *rows]))


def write_classifier(folder):
    """Texts, and a classifier that has been trained on their labels."""
    write_emotion(folder / "texts")
    labels = ANIMALS[:5]
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model = transformers.BertForSequenceClassification(tiny.bert_config(**names, hidden_act="relu"))
    model.save_pretrained(folder / "model")
    tiny.tokenizer(folder / "model", WORDS, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))


def write_vit(folder):
    """A pretrained ViT with a head of another size, and its image processor."""
    config = tiny.CONFIGS["vit"]()
    config.num_channels = 3
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    ImagePreprocessing(3, 8, (0.5,) * 3, (0.5,) * 3, keeps_ratio=False).write(folder)


def write_images(folder, sizes):
    """Folders of images by split, one colour a class."""
    for split, size in sizes.items():
        for i in range(size):
            of_class = folder / split / ANIMALS[i % 3]
            of_class.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 10), [(200, i, 0), (0, 200, i), (i, 0, 200)][i % 3]).save(of_class / f"{i}.jpg")


def write_decoder(folder, kind):
    """A pretrained decoder, and its tokenizer."""
    tiny.tokenizer(folder, WORDS, ("[PAD]", "[UNK]", "<eos>"))
    tiny.SOURCES[f"{kind}-causal-language-modeling"]().build([]).save_pretrained(folder)


def write_texts(folder):
    """Shards of texts."""
    for shard in range(2):
        write(folder, f"train-{shard}", [{"text": phrase(i + shard, 5 + i % 3)} for i in range(60)])
    write(folder, "validation-0", [{"text": phrase(i, 5)} for i in range(20)])


def write_bert(folder):
    """A pretrained BERT without a head, and its tokenizer."""
    tiny.tokenizer(folder, WORDS, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    transformers.BertModel(tiny.bert_config()).save_pretrained(folder)


def with_relu(folder):
    """The pretrained model in ``folder`` as one that has been trained on with ReLU."""
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_act"] != "relu"
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))


def write_mnli(folder):
    """Pairs of texts; the test labels are hidden, as on the hub."""
    sizes = {"train": 25, "validation_matched": 7, "validation_mismatched": 9, "test_matched": 5}
    for name, size in sizes.items():
        rows = [
            {"premise": phrase(i), "hypothesis": phrase(i + 3, 2), "label": -1 if name == "test_matched" else i % 3}
            for i in range(size)
        ]
        write(folder, name, rows)


def write_squad(folder, answerless=lambda i: False):
    """Questions with texts that hold the answer, or do not where ``answerless``."""
    for name, size in {"train": 13, "validation": 7}.items():
        rows = []
        for i in range(size):
            context, answer = phrase(i, 14), ANIMALS[i % 5]
            answers = {"text": [answer], "answer_start": [context.index(answer)]}
            if answerless(i):
                answers = {"text": [], "answer_start": []}
            rows.append({"context": context, "question": "who is it ?", "answers": answers})
        write(folder, name, rows)


def phrase(i, length=None):
    """Some words, an animal among colours."""
    words = [COLOURS[(i + j) % 3] for j in range((length or 2 + i % 3) - 1)]
    return " ".join([*words[: i % 7], ANIMALS[i % 5], *words[i % 7 :]])


def write(folder, name, rows):
    """JSON lines."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
