"""A model with nanoVLM's interface: what its layers are called, take and return, and how they mask.

Written anew for the tests, after the interface of nanoVLM at commit 4e0c096: attention layers that take
(x, cos, sin, attention_mask, block_kv_cache), a mask of [batch, length] over keys, positions that the
language model makes itself, image features put where `tokenizer.image_token_id` stands, and targets that are
shifted already.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Sizes:
    """The names of nanoVLM's config."""

    vocabulary: int
    vit_img_size: int = 32
    vit_patch_size: int = 8
    mp_image_token_length: int = 4
    max_img_size: int = 64
    resize_to_max_side_len: bool = False
    width: int = 32


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.dropout = 4, 2, width // 4, 0.0
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width // 2, bias=False)
        self.v_proj = nn.Linear(width, width // 2, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.resid_dropout = nn.Dropout(0.0)

    def forward(self, x, cos, sin, attention_mask=None, block_kv_cache=None):
        def heads(states):
            return states.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

        def turn(states):
            first, second = states.chunk(2, -1)
            return states * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

        query, key, value = turn(heads(self.q_proj(x))), turn(heads(self.k_proj(x))), heads(self.v_proj(x))
        length = x.shape[1]
        scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / self.head_dim**0.5
        scores = scores.masked_fill(~torch.ones(length, length).tril().bool(), float("-inf"))
        if attention_mask is not None:
            scores = (
                scores + (1.0 - attention_mask[:, None, None, :length].float()) * torch.finfo(x.dtype).min
            )
        out = scores.softmax(-1) @ value.repeat_interleave(2, 1)
        return self.resid_dropout(self.out_proj(out.transpose(1, 2).flatten(2))), {"key": key, "value": value}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.mlp = (
            Attention(width),
            nn.Sequential(nn.Linear(width, 48), nn.SiLU(), nn.Linear(48, width)),
        )
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x, cos, sin, attention_mask):
        x = x + self.attn(self.norm1(x), cos, sin, attention_mask, None)[0]
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList([Block(sizes.width) for _ in range(2)])
        self.norm, self.head = nn.RMSNorm(sizes.width), nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        self.dim = sizes.width // 4

    def forward(self, x, attention_mask=None):
        rates = 1e4 ** -(torch.arange(0, self.dim, 2) / self.dim)
        angles = torch.arange(x.shape[1])[:, None] * rates
        angles = torch.cat([angles, angles], -1).expand(len(x), -1, -1)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin(), attention_mask)
        return self.norm(x), None


class VisionLanguageModel(nn.Module):
    def __init__(self, sizes: Sizes, image_token_id: int) -> None:
        super().__init__()
        self.cfg, self.tokenizer = sizes, SimpleNamespace(image_token_id=image_token_id)
        side = sizes.vit_patch_size * 2  # 2 x 2 patches are an image token
        self.vision_encoder = nn.Conv2d(3, sizes.width, side, side)
        self.MP = nn.Linear(sizes.width, sizes.width, bias=False)
        self.decoder = Decoder(sizes)

    def forward(self, input_ids, images, attention_mask=None, targets=None):
        if isinstance(images, list):
            images = torch.cat(images) if images else None
        embedded = self.decoder.token_embedding(input_ids)
        if images is not None:
            features = self.MP(self.vision_encoder(images).flatten(2).transpose(1, 2))
            embedded = embedded.clone()
            embedded[input_ids == self.tokenizer.image_token_id] = features.reshape(-1, features.shape[-1])
        logits, _ = self.decoder(embedded, attention_mask=attention_mask)
        loss = None
        if targets is not None:
            logits = self.decoder.head(logits)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        return logits, loss
