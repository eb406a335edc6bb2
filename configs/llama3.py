r"""Llama 3: 8b, 70b. Grattafiori et al., arXiv:2407.21783, sections 3.2 and 3.4.

  python -m jaxlm.train --config configs/llama3.py:8b --config.mesh.data=1 --config.mesh.fsdp=-1 \
      --config.data.train=PREFIX --config.data.tokenizer=hf:tokenizer.json

Context 8,192, 8 million tokens a step, 15 trillion tokens; the paper gives each size's peak learning rate. Warm-up of 8,000
steps and cosine are those of its largest model. The model's card speaks of 1.3 (8B) and 6.4 (70B) million H100 hours.
"""

from ml_collections import ConfigDict

PEAK_LR = {"8b": 3.0e-4, "70b": 1.5e-4}


def get_config(size: str = "8b") -> ConfigDict:
    if size not in PEAK_LR:
        raise ValueError(f"{size!r}: choose one of {', '.join(PEAK_LR)}")
    return ConfigDict(
        dict(
            model=dict(preset=f"llama3-{size}", dtype="bfloat16", remat="full"),
            train=dict(num_steps=1_800_000, batch_size=1024, accumulate=64, eval_every=1000, eval_batches=20),
            optim=dict(peak_lr=PEAK_LR[size], warmup_steps=8000, final_lr_frac=0.01),
            data=dict(split=(0.99, 0.01)),
            checkpoint=dict(every_steps=1000),
            log=dict(every_steps=10),
        )
    )
