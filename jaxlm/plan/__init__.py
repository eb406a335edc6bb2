"""What a config would do, told without doing it: `python -m jaxlm.plan`.

schedule.py  a pipeline's ticks by stage, with its bubble, as text and as a picture
__main__.py  the command: from config and number of devices to what is drawn

Runs on any machine: no device is touched, no data read. May import what is below the tools (jaxlm.pipelined, parallel/,
models/, metrics/, settings, config) and no other tool. Start at schedule.py.
"""
