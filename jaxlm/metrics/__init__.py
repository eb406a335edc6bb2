"""What a run measures about itself: the metrics file, throughput, FLOPs and MFU, the progress line.

writer.py      MetricsLog and read_metrics: WORKDIR/metrics.jsonl and TensorBoard, cut back on resume, never fatal
throughput.py  FLOPs per token, the peak of each chip with its source, and StepMeter: time stamps of steps -> rates and MFU
ledger.py      Ledger and read_account: where the time of a run went, over all its starts
progress.py    Progress: one live line on a terminal, readable plain lines in a log
summary.py     the results of a run from its metrics; the smoothed loss
text.py        losses, counts and durations as people read them; foreign text in Markdown, quoted safely

Imports jaxlm.config, numpy and tensorboardX; never jax, a device or another room. Start at writer.py.
"""
