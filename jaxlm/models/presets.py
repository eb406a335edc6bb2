"""Published sizes: one row a model, with the parameter count its authors give.

A row holds ModelConfig values; config layers it under the file and the command line. Counts exclude vocabulary padding.
Sources: GPT-2, Radford et al. 2019 and its released weights; GPT-3, Brown et al., arXiv:2005.14165, table 2.1 (all layers
dense here; 1.3B with 16 heads of 128 and 13B with width 5120, as the table's heads times width require); BLOOM, BigScience,
arXiv:2211.05100, table 3 and its released weights; Llama 2, Touvron et al., arXiv:2307.09288 and its released weights;
Llama 3, Grattafiori et al., arXiv:2407.21783, table 3 and its released weights (8,192 positions, as first released).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GPT = dict(
    position="learned", norm="layernorm", activation="gelu", use_bias=True, tie_embeddings=True, vocab_size=50257
)
BLOOM = dict(
    position="alibi", norm="layernorm", embed_norm=True, activation="gelu", use_bias=True, tie_embeddings=True,
    vocab_size=250880, max_seq_len=2048,
)  # fmt: skip
LLAMA = dict(
    position="rope", norm="rmsnorm", activation="swiglu", use_bias=False, tie_embeddings=False, vocab_size=32000,
    max_seq_len=4096,
)  # fmt: skip
LLAMA3 = LLAMA | dict(vocab_size=128256, max_seq_len=8192, rope_theta=500_000.0)


def _size(layers: int, width: int, heads: int, **more: Any) -> dict[str, Any]:
    return dict(num_layers=layers, embed_dim=width, num_heads=heads, **more)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "gpt2-124m": GPT | _size(12, 768, 12, max_seq_len=1024),
    "gpt2-355m": GPT | _size(24, 1024, 16, max_seq_len=1024),
    "gpt2-774m": GPT | _size(36, 1280, 20, max_seq_len=1024),
    "gpt2-1558m": GPT | _size(48, 1600, 25, max_seq_len=1024),
    "gpt3-125m": GPT | _size(12, 768, 12, max_seq_len=2048),
    "gpt3-350m": GPT | _size(24, 1024, 16, max_seq_len=2048),
    "gpt3-760m": GPT | _size(24, 1536, 16, max_seq_len=2048),
    "gpt3-1.3b": GPT | _size(24, 2048, 16, max_seq_len=2048),
    "gpt3-2.7b": GPT | _size(32, 2560, 32, max_seq_len=2048),
    "gpt3-6.7b": GPT | _size(32, 4096, 32, max_seq_len=2048),
    "gpt3-13b": GPT | _size(40, 5120, 40, max_seq_len=2048),
    "gpt3-175b": GPT | _size(96, 12288, 96, max_seq_len=2048),
    "bloom-560m": BLOOM | _size(24, 1024, 16),
    "bloom-1b1": BLOOM | _size(24, 1536, 16),
    "bloom-1b7": BLOOM | _size(24, 2048, 16),
    "bloom-3b": BLOOM | _size(30, 2560, 32),
    "bloom-7b1": BLOOM | _size(30, 4096, 32),
    "bloom-176b": BLOOM | _size(70, 14336, 112, init_std=0.0048),  # sqrt(1 / (3 * width)), its training script
    "llama2-7b": LLAMA | _size(32, 4096, 32, mlp_dim=11008, num_kv_heads=32),
    "llama2-13b": LLAMA | _size(40, 5120, 40, mlp_dim=13824, num_kv_heads=40),
    "llama2-70b": LLAMA | _size(80, 8192, 64, mlp_dim=28672, num_kv_heads=8),
    "llama3-8b": LLAMA3 | _size(32, 4096, 32, mlp_dim=14336, num_kv_heads=8),
    "llama3-70b": LLAMA3 | _size(80, 8192, 64, mlp_dim=28672, num_kv_heads=8),
}

PUBLISHED_PARAMS = {
    "gpt2-124m": 124_439_808, "gpt2-355m": 354_823_168, "gpt2-774m": 774_030_080, "gpt2-1558m": 1_557_611_200,
    "gpt3-125m": 125e6, "gpt3-350m": 350e6, "gpt3-760m": 760e6, "gpt3-1.3b": 1.3e9, "gpt3-2.7b": 2.7e9,
    "gpt3-6.7b": 6.7e9, "gpt3-13b": 13.0e9, "gpt3-175b": 175.0e9,
    "bloom-560m": 559_214_592, "bloom-1b1": 1_065_314_304, "bloom-1b7": 1_722_408_960, "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064, "bloom-176b": 176_247_271_424,
    "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496,
}  # fmt: skip
