"""Wrap a Hugging Face data set in a DataLoader of packed, checked batches.

Run it with `python examples/wrap_dataset.py`; it needs `pip install 'vlmpack[demo]'` and no network.
"""

from torch.utils.data import DataLoader

from vlmpack import ConstantLengthDataset, Tiling, VQACollator, VQADataset, add_image_tokens
from vlmpack.corpus import load_corpus, load_tokenizer

dataset = load_corpus()  # or datasets.load_dataset("HuggingFaceM4/the_cauldron", "ai2d", split="train")
tokenizer = load_tokenizer()  # or transformers.AutoTokenizer.from_pretrained(...)
tiling = Tiling(tile_size=512, max_side=1024)
growth = add_image_tokens(tokenizer, tiling)  # model.resize_token_embeddings(growth.num_embeddings)

samples = VQADataset(dataset, tokenizer, tiling=tiling)
packs = ConstantLengthDataset(samples, seq_length=4096, max_images_per_knapsack=18, max_patches=48 * 1024)
loader = DataLoader(packs, batch_size=2, collate_fn=VQACollator(tokenizer, max_length=4096))

for step, batch in enumerate(loader):
    # `tiles` go to the vision encoder; the rest is what a causal language model takes.
    shapes = ", ".join(f"{name} {list(batch[name].shape)}" for name in ("input_ids", "labels", "tiles"))
    print(f"step {step}: {sum(map(len, batch['keys']))} samples, {shapes}")

report = packs.report
print(f"{report.num_packed} of {report.num_read} rows packed, {report.padding:.1%} padding")
for refusal in report.refusals:
    print(f"refused row {refusal.key}: {refusal.message}")
