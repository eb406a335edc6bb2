"""One GPT, varied by config: GPT-2/3, BLOOM and Llama are rows of presets.py.

May import jaxlm.config and jaxlm.parallel; knows no data, optimizer or file. Each parameter is declared once, with its
shape, logical dims, role and initial values (params.py). Start with gpt.py, then attention.py and loss.py.
"""
