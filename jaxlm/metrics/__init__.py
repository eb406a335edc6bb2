"""What a run measures about itself: the metrics file, throughput, FLOPs and MFU, the progress line.

writer.py    MetricsLog and read_metrics: WORKDIR/metrics.jsonl and TensorBoard, cut back on resume, never fatal
meter.py     StepMeter: time stamps of steps -> step_time_s, tokens_per_s, mfu, data_wait_s
ledger.py    Ledger and read_account: where the time of a run went, over all its starts
flops.py     FLOPs per token and MFU, with the convention they are quoted under
chips.py     dense bf16 peak of each chip, with its source
progress.py  Progress: one live line on a terminal, readable plain lines in a log
summary.py   the results of a run from its metrics; the smoothed loss
numbers.py   losses, counts and durations as people read them; markdown.py: foreign text, quoted safely

Imports jaxlm.config, numpy and tensorboardX; never jax, a device or another room. Start at writer.py.
"""
