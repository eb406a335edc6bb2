"""FLOPs of training one token, and the share of the hardware's peak that they amount to (MFU).

Letters as in the PaLM paper: N parameters, L layers, H query heads, Q width of one head, T tokens in a row.
"""

from __future__ import annotations

CONVENTION = (
    "(6*N_nonpositional + 12*L*H*Q*T) FLOPs per token, full (non-causal) attention, no recomputation counted, "
    "over the dense bf16 peak of the chips: the PaLM / nanoGPT convention"
)


def flops_per_token(
    *, num_nonpositional_params: int, num_layers: int, num_heads: int, head_dim: int, seq_len: int, causal: bool = False
) -> int:
    """FLOPs of one token's forward and backward pass: 6*N + 12*L*H*Q*T, or 6*N + 6*L*H*Q*T if causal.

    6*N: a weight takes part in one multiply and one add forward (2), and twice that backward (4: the gradient of its
    input and its own gradient). 12*L*H*Q*T: in each layer a query meets T keys in two products, QK^T and the
    attention-weighted sum of V, of H*Q multiply-adds per key each: 2*2*H*Q*T forward, tripled by the backward pass.
    A causal query sees (T+1)/2 keys on average; the causal figure takes T/2.

    N counts every parameter except a learned position table, which is read, not multiplied. It includes the token
    embedding once: exact when the head is tied to it, an overcount by the size of the lookup table when it is not.
    Biases and norm scales are in N too, where 6 is slightly too many. H counts query heads also when keys and values
    have fewer. Left out: softmax, norms, activations, dropout, the loss, the optimizer, rematerialisation, padding.

    Source: Chowdhery et al., PaLM, arXiv:2204.02311, appendix B; nanoGPT model.py `estimate_mfu`, which leaves
    the position table out of N.
    """
    per_key = 6 if causal else 12
    return 6 * num_nonpositional_params + per_key * num_layers * num_heads * head_dim * seq_len


def mfu(
    *, tokens_per_s: float, flops_per_token: float, peak_flops_per_s: float | None, num_devices: int
) -> float | None:
    """Model FLOPs utilisation in 0..1: tokens_per_s of all devices over what their peaks, if known, allow."""
    return tokens_per_s * flops_per_token / (peak_flops_per_s * num_devices) if peak_flops_per_s else None
