"""Text to tokens to batches, in pure numpy: every row of every step is a function of (seed, step).

    indexed.py     Megatron's .bin/.idx token sets: mapped reader, streaming writer;  stored.py the reader's files in a bucket
    tokenizer.py   bytes, chars, gpt2, hf, tiktoken, sentencepiece behind one protocol
    documents.py   source files (.jsonl, plain text, .gz, .zst) to documents to token sets, in constant memory
    preprocess.py, merge.py, verify.py, inspect.py   the commands that write, join, check and show token sets
    prepare.py     text named in a config to a token set in the workdir, once
    samples.py     sample number -> stretches of tokens, in the order of new runs or as Megatron draws them
    packing.py     rows of whole documents;  blend.py mixtures of any samples;  infill.py rows with their middles moved
    loader.py      step number -> how many samples, and their batch; the thread that works ahead
    corpus.py      a config's data section, opened

May import `jaxlm.config` and `jaxlm.settings`, numpy, tokenizers, tiktoken, zstandard and tqdm (sentencepiece where a
tokenizer is named after it); neither jax nor another room. Start reading at `corpus.py`, then `loader.py`, `samples.py`.
"""
