"""Train a SmolVLM on packs with Hugging Face Trainer: a tiny random one, on the corpus that ships.

    python examples/train_smolvlm.py                                     on one process
    torchrun --nproc-per-node 2 examples/train_smolvlm.py                on two
    python examples/train_smolvlm.py --resume runs/smolvlm/checkpoint-6  on from the middle

It needs `pip install 'vlmpack[trainer,demo]'` and no network. For a real run, load model, tokenizer and image
processor with from_pretrained, and leave out what is marked "tiny".
"""

import argparse
import sys

import torch
from transformers import AutoModelForImageTextToText, SmolVLMConfig, TrainingArguments

from vlmpack import ConstantLengthDataset, VQACollator, VQADataset
from vlmpack.corpus import CHATML, load_corpus, load_tokenizer
from vlmpack.families import SmolVLM, add_family_tokens
from vlmpack.integrations.transformers import PackedTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="runs/smolvlm")
parser.add_argument("--resume", help="a checkpoint's folder")
options = parser.parse_args()

# The data: any Hugging Face data set with images and conversations.
dataset = load_corpus().select(range(100))
texts = [turn["user"] + turn["assistant"] for row in dataset["texts"] for turn in row]
tokenizer = load_tokenizer().train_new_from_iterator(texts, vocab_size=600)  # tiny
tokenizer.chat_template = CHATML

# The family says how images are cut and what forward takes. Real: family_for(model.config, image_processor).
family = SmolVLM(tile=32, longest_edge=64, patch_size=8, scale_factor=2)  # tiny
growth = add_family_tokens(tokenizer, family)

torch.manual_seed(0)
config = SmolVLMConfig(  # tiny
    vision_config={
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": family.tile,
        "patch_size": family.patch_size,
    },
    text_config={
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": growth.num_embeddings,
        "pad_token_id": 0,
    },
    image_token_id=tokenizer.convert_tokens_to_ids(family.image_token),
    scale_factor=family.scale_factor,
    pad_token_id=tokenizer.pad_token_id,
)
model = AutoModelForImageTextToText.from_config(config)

# One plan for the whole data set, the same on every rank; pixels are decoded when their turn comes.
samples = VQADataset(dataset, tokenizer, family=family)
packs = ConstantLengthDataset(samples, seq_length=1024, max_images_per_knapsack=12).index()
collator = VQACollator(tokenizer, max_length=1024, family=family, dummy_image=True)

trainer = PackedTrainer(
    model,
    TrainingArguments(
        output_dir=options.output,
        per_device_train_batch_size=1,  # packs
        gradient_accumulation_steps=2,
        max_steps=12,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        save_steps=6,  # weights, optimizer, and the place in the data
        logging_steps=1,
        ddp_find_unused_parameters=False,  # dummy_image gives every rank a gradient for the vision encoder
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,  # tiny
    ),
    train_dataset=packs,
    data_collator=collator,
    loss_weighting="token",
)
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model(options.output)

if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    refused = packs.index.report
    print(f"{len(packs.index.rows)} of {refused.num_read} rows in {len(packs)} packs; {trainer.counts}")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
    if losses[-1] > 0.9 * losses[0]:
        sys.exit("the loss did not fall")
