"""How arrays lie on devices: the mesh and the one table from logical dims to mesh axes.

May import jaxlm.config and jax; knows no model. Start with rules.py.
"""
