r"""Llama 2: 7b, 13b, 70b. Touvron et al., arXiv:2307.09288, section 2.2.

  python -m jaxlm.train --config configs/llama2.py:7b --config.mesh.data=1 --config.mesh.fsdp=-1 \
      --config.data.train=PREFIX --config.data.tokenizer=sentencepiece:tokenizer.model

Context 4,096, 4 million tokens a step, 2 trillion tokens, cosine to a tenth, 2,000 steps of warm-up.
The paper spent 184,320 (7B), 368,640 (13B) and 1,720,320 (70B) A100 hours.
"""

from ml_collections import ConfigDict

PEAK_LR = {"7b": 3.0e-4, "13b": 3.0e-4, "70b": 1.5e-4}


def get_config(size: str = "7b") -> ConfigDict:
    if size not in PEAK_LR:
        raise ValueError(f"{size!r}: choose one of {', '.join(PEAK_LR)}")
    return ConfigDict(
        dict(
            model=dict(preset=f"llama2-{size}", dtype="bfloat16", remat="full"),
            train=dict(num_steps=500_000, batch_size=1024, accumulate=32, eval_every=1000, eval_batches=20),
            optim=dict(peak_lr=PEAK_LR[size], warmup_steps=2000, eps=1e-5),
            data=dict(split=(0.99, 0.01)),
            checkpoint=dict(every_steps=1000),
            log=dict(every_steps=10),
        )
    )
