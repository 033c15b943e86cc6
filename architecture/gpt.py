"""The decoder of GPT-2: a pre-norm transformer with learned positions and GELU."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    """Causal self-attention of (B, T, width)."""

    def __init__(self, width, heads, dropout, bias):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.c_attn = nn.Linear(width, 3 * width, bias)  # query, key, value
        self.c_proj = nn.Linear(width, width, bias)

    def forward(self, x):
        qkv = self.c_attn(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(
            *qkv, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers, four times as wide between them, of (B, T, width)."""

    def __init__(self, width, bias):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias)
        self.c_proj = nn.Linear(4 * width, width, bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm, on a residual stream (B, T, width)."""

    def __init__(self, width, heads, dropout, bias, affine):
        super().__init__()
        self.ln_1, self.ln_2 = (_norm(width, bias, affine) for _ in range(2))
        self.attn, self.mlp = Attention(width, heads, dropout, bias), MLP(width, bias)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Tokens (B, T), int64 with T at most `context`, to logits (B, T, vocabulary).

    Modules have the names of transformers' GPT-2. Weights start as GPT-2's: normal with deviation
    0.02, divided by sqrt(2 depth) at the end of a residual branch; biases are 0, gains 1. Raises
    ValueError for heads that do not divide the width, and for longer inputs.

    Args:
        depth, width, heads: blocks, the size of the residual stream, and of attention.
        dropout: of the embeddings, attention weights and branches, in training.
        tied: the head's weight is the token embedding.
        bias: biases in linear layers and, with `affine`, norms. affine: gains in norms.
    """

    def __init__(
        self, vocabulary, context, depth, width, heads, dropout=0.0, tied=True, bias=True,
        affine=True,
    ):  # fmt: skip
        super().__init__()
        if width % heads:
            most = max(h for h in range(1, heads) if width % h == 0)
            raise ValueError(f"{heads} heads do not divide a width of {width}: {most} would do")
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(width, heads, dropout, bias, affine) for _ in range(depth))
        self.ln_f = _norm(width, bias, affine)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                branch = math.sqrt(2 * depth) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / branch)

    def forward(self, tokens):
        context = self.wpe.num_embeddings
        if tokens.shape[1] > context:  # of which a GPU would tell nothing but an assertion
            raise ValueError(f"{tokens.shape[1]} tokens are more than the context of {context}")
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def _norm(width, bias, affine):
    return nn.LayerNorm(width, elementwise_affine=affine, bias=bias)
