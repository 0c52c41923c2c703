"""Train a Qwen3-VL on packs with Hugging Face Trainer, each sample counting alike, and evaluate it.

    python examples/train_qwen_vl.py                                     on one process
    torchrun --nproc-per-node 2 examples/train_qwen_vl.py                on two
    python examples/train_qwen_vl.py --resume runs/qwen_vl/checkpoint-6  on from the middle

A tiny random model, on the corpus that ships. It needs `pip install 'vlmpack[trainer,demo]'` and no
network. For a real run, load model, tokenizer and image processor with from_pretrained, and leave out what is
marked "tiny".
"""

import argparse
import sys

import torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig, TrainingArguments

from vlmpack import ConstantLengthDataset, VQACollator, VQADataset
from vlmpack.corpus import CHATML, load_corpus, load_tokenizer
from vlmpack.families import Qwen3VL, add_family_tokens
from vlmpack.integrations.transformers import PackedTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="runs/qwen_vl")
parser.add_argument("--resume", help="a checkpoint's folder")
options = parser.parse_args()

# The data: any Hugging Face data set with images and conversations.
dataset = load_corpus().select(range(100))
texts = [turn["user"] + turn["assistant"] for row in dataset["texts"] for turn in row]
tokenizer = load_tokenizer().train_new_from_iterator(texts, vocab_size=600)  # tiny
tokenizer.chat_template = CHATML

# The family says how images are cut and what forward takes. Real: family_for(model.config, image_processor).
family = Qwen3VL(min_pixels=32 * 32, max_pixels=64 * 64)  # tiny
growth = add_family_tokens(tokenizer, family)

torch.manual_seed(0)
config = Qwen3VLConfig(  # tiny
    vision_config={
        "depth": 2,
        "hidden_size": 48,
        "out_hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 4,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
        "patch_size": family.patch_size,
    },
    text_config={
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "vocab_size": growth.num_embeddings,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 2, 2],
            "mrope_interleaved": True,
        },
    },
    image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
    vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
)
model = AutoModelForImageTextToText.from_config(config)


def pack(rows):
    """One plan for a data set, the same on every rank; pixels are decoded when their turn comes."""
    samples = VQADataset(rows, tokenizer, family=family)
    return ConstantLengthDataset(samples, seq_length=1024, max_images_per_knapsack=12).index()


packs, held_out = pack(dataset.select(range(90))), pack(dataset.select(range(90, 100)))
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
        eval_strategy="steps",
        eval_steps=6,
        save_steps=6,  # weights, optimizer, and the place in the data
        logging_steps=1,
        ddp_find_unused_parameters=False,  # dummy_image gives every rank a gradient for the vision encoder
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,  # tiny
    ),
    train_dataset=packs,
    eval_dataset=held_out,
    data_collator=collator,
    loss_weighting="sample",
)
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model(options.output)

if trainer.is_world_process_zero():
    for name in ("loss", "eval_loss"):
        losses = [entry[name] for entry in trainer.state.log_history if name in entry]
        print(f"{name} {losses[0]:.4f} -> {losses[-1]:.4f}")
        if losses[-1] > 0.95 * losses[0]:
            sys.exit(f"the {name} did not fall")
