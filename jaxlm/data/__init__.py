"""Text to tokens to batches, in pure numpy: every row of every step is a function of (seed, step).

    atomic.py      files that appear whole or not at all, and locks that die with their holder
    indexed.py     Megatron's .bin/.idx token sets: mapped reader, streaming writer
    tokenizer.py   bytes, chars, gpt2, hf, tiktoken, sentencepiece behind one protocol
    documents.py   source files (.jsonl, plain text, .gz, .zst) to documents, in constant memory
    encode.py      documents to token sets, in this process or several; progress.py tells how far it is
    preprocess.py  the command that writes token sets;  verify.py the command that checks them
    prepare.py     text named in a config to a token set in the workdir, once
    samples.py     sample number -> window of tokens, without state
    loader.py      step number -> batch, and the thread that works ahead

May import `jaxlm.config`, numpy, tokenizers, zstandard and tqdm (tiktoken and sentencepiece where a tokenizer is
named after them); neither jax nor another room. Start reading at `loader.py`, then `samples.py`.
"""
