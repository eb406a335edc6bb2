"""GPT-2: 124m, 355m, 774m, 1558m. Radford et al. 2019; the recipe is nanoGPT's reproduction of the 124M model.

  python -m jaxlm.train --config configs/gpt2.py:124m --config.data.path=corpus.jsonl.zst --config.data.tokenizer=gpt2:DIR

DIR holds vocab.json and merges.txt. 491,520 tokens a step; 600,000 steps on OpenWebText are published to reach a
validation loss of 2.85 at 124M. Speed on one H100: docs/results.md.
"""

from ml_collections import ConfigDict

# rows of 1,024 tokens in one microbatch on one 80 GB GPU
MICROBATCH = {"124m": 32, "355m": 16, "774m": 8, "1558m": 4}


def get_config(size: str = "124m") -> ConfigDict:
    if size not in MICROBATCH:
        raise ValueError(f"{size!r}: choose one of {', '.join(MICROBATCH)}")
    return ConfigDict(
        dict(
            model=dict(preset=f"gpt2-{size}", dtype="bfloat16"),
            train=dict(
                num_steps=600_000, batch_size=480, accumulate=480 // MICROBATCH[size], eval_every=1000, eval_batches=20
            ),
            optim=dict(peak_lr=6e-4, warmup_steps=2000),
            data=dict(split=(0.99, 0.01)),
            checkpoint=dict(every_steps=1000),
            log=dict(every_steps=10),
        )
    )
