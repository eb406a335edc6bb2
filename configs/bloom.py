"""BLOOM: 560m, 1b1, 1b7, 3b, 7b1, 176b. BigScience, arXiv:2211.05100, table 3: batch and learning rate.

  python -m jaxlm.train --config configs/bloom.py:560m --config.data.train=PREFIX --config.data.tokenizer=hf:tokenizer.json

Context 2,048, ALiBi, LayerNorm after the embedding. 341 billion tokens (366 billion for 176b), cosine decay to a tenth,
warm-up over 375 million tokens. The 176B model took 384 A100s 3.5 months.
"""

from ml_collections import ConfigDict

# size: (rows a step, peak learning rate, tokens in all)
TABLE = {
    "560m": (256, 3.0e-4, 341e9), "1b1": (256, 2.5e-4, 341e9), "1b7": (512, 2.0e-4, 341e9),
    "3b": (512, 1.6e-4, 341e9), "7b1": (512, 1.2e-4, 341e9), "176b": (2048, 6.0e-5, 366e9),
}  # fmt: skip


def get_config(size: str = "560m") -> ConfigDict:
    if size not in TABLE:
        raise ValueError(f"{size!r}: choose one of {', '.join(TABLE)}")
    rows, lr, tokens = TABLE[size]
    return ConfigDict(
        dict(
            model=dict(preset=f"bloom-{size}", dtype="bfloat16", remat="full" if size in ("7b1", "176b") else "none"),
            train=dict(
                num_steps=round(tokens / (rows * 2048)),
                batch_size=rows,
                accumulate=rows // 16,
                eval_every=1000,
                eval_batches=20,
            ),
            optim=dict(peak_lr=lr, warmup_steps=round(375e6 / (rows * 2048))),
            data=dict(split=(0.99, 0.01)),
            checkpoint=dict(every_steps=1000),
            log=dict(every_steps=10),
        )
    )
