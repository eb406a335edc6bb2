"""Character-level Shakespeare, in the two settings that nanoGPT publishes. The text is a file of yours:

  python -m jaxlm.train --config configs/shakespeare.py:cpu --config.data.path=tinyshakespeare.txt
  python -m jaxlm.train --config configs/shakespeare.py:gpu --config.data.path=tinyshakespeare.txt

cpu: 4 layers, width 128, context 64, 2,000 steps; about two minutes on two cores; published validation loss 1.88.
gpu: 6 layers, width 384, context 256, dropout 0.2, 5,000 steps; about two minutes on an H100; published best 1.4697.
What jaxlm reaches is in docs/results.md. Source: nanoGPT, README and config/train_shakespeare_char.py.
"""

from ml_collections import ConfigDict


def get_config(size: str = "cpu") -> ConfigDict:
    if size not in ("cpu", "gpu"):
        raise ValueError(f"{size!r}: choose cpu or gpu")
    if size == "cpu":
        model = dict(num_layers=4, num_heads=4, embed_dim=128, max_seq_len=64)
        train, log_every = dict(num_steps=2000, batch_size=12, seed=1), 1
    else:
        model = dict(num_layers=6, num_heads=6, embed_dim=384, max_seq_len=256, dropout=0.2, dtype="bfloat16")
        train, log_every = dict(num_steps=5000, batch_size=64), 10
    return ConfigDict(
        dict(
            model=model | dict(use_bias=False, vocab_multiple=1),
            train=train | dict(eval_every=250),
            optim=dict(peak_lr=1e-3, warmup_steps=100, beta2=0.99),
            data=dict(tokenizer="chars", split=(0.9, 0.1)),
            checkpoint=dict(every_steps=250),
            log=dict(every_steps=log_every, sample_prompt="\n", sample_tokens=400),
        )
    )
