"""How arrays lie on devices: the mesh and the one table from logical dims to mesh axes.

rules.py    the table: logical dim -> mesh axes, computing and at rest
mesh.py     degrees -> Mesh
context.py  attention over a mesh: how the positions of a row meet, chosen and differentiated
zigzag.py   one of the ways: a block of keys at a time, round a ring or gathered

May import jaxlm.config and jax; knows no model. Start with rules.py.
"""
