"""A converted model in the Trainer of transformers: LoRA on its attention and experts, then saved merged.

Needs `pip install accelerate peft`.
"""

import torch
import transformers
from peft import LoraConfig, get_peft_model

from d2dmoe_pl import ExpertsConfig, GateConfig, RouterConfig, add_routers_, convert_to_moe_, load_model, set_gate_

shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=100, **shape))
convert_to_moe_(model, ExpertsConfig(num_experts=8))
add_routers_(model, RouterConfig(width=16))  # of a chain, these are trained
set_gate_(model, GateConfig("dynk_max", tau=0.7))

ids = torch.randint(1, 100, (64, 12))
data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in ids]

adapted = get_peft_model(
    model,
    LoraConfig(
        r=4,
        target_modules=["query", "value"],
        target_parameters=["experts.up_weight", "experts.down_weight"],
        modules_to_save=["classifier"],
    ),
)
arguments = transformers.TrainingArguments("trained", max_steps=8, report_to=[], learning_rate=1e-3, disable_tqdm=True)
transformers.Trainer(adapted, arguments, train_dataset=data).train()

merged = adapted.merge_and_unload()
merged.save_pretrained("artifact")  # gates and routers with it
print(load_model("artifact")(input_ids=ids[:2]).logits)
