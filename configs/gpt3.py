"""GPT-3: 125m, 350m, 760m, 1.3b, 2.7b, 6.7b, 13b, 175b. Brown et al., arXiv:2005.14165, table 2.1: batch and learning rate.

  python -m jaxlm.train --config configs/gpt3.py:125m --config.data.train=PREFIX --config.data.tokenizer=gpt2:DIR

300 billion tokens each, context 2,048, cosine to a tenth over 260 billion tokens (here: over the run), warm-up over 375
million tokens. Attention is dense in every layer, where the paper alternates with banded sparse layers.
"""

from ml_collections import ConfigDict

# size: (tokens a step, peak learning rate)
TABLE = {
    "125m": (0.5e6, 6.0e-4), "350m": (0.5e6, 3.0e-4), "760m": (0.5e6, 2.5e-4), "1.3b": (1e6, 2.0e-4),
    "2.7b": (1e6, 1.6e-4), "6.7b": (2e6, 1.2e-4), "13b": (2e6, 1.0e-4), "175b": (3.2e6, 0.6e-4),
}  # fmt: skip


def get_config(size: str = "125m") -> ConfigDict:
    if size not in TABLE:
        raise ValueError(f"{size!r}: choose one of {', '.join(TABLE)}")
    tokens, lr = TABLE[size]
    rows = 256 * round(tokens / 2048 / 256)
    return ConfigDict(
        dict(
            model=dict(preset=f"gpt3-{size}", dtype="bfloat16", remat="attn_context=keep" if tokens > 1e6 else "none"),
            train=dict(
                num_steps=round(300e9 / (rows * 2048)),
                batch_size=rows,
                accumulate=rows // 32,
                eval_every=1000,
                eval_batches=20,
            ),
            optim=dict(peak_lr=lr, warmup_steps=round(375e6 / (rows * 2048))),
            data=dict(split=(0.99, 0.01)),
            checkpoint=dict(every_steps=1000),
            log=dict(every_steps=10),
        )
    )
