"""How arrays lie on devices: the mesh and the one table from logical dims to mesh axes.

rules.py    the table: logical dim -> mesh axes, computing and at rest
mesh.py     degrees -> Mesh
check.py    what a table must hold, and what it must not leave replicated
dense.py    products with the model's weights: gathers, sums and scatters, placed by hand
context.py  attention over a mesh: how the positions of a row meet, chosen and differentiated
zigzag.py   one of the ways: a block of keys at a time, round a ring or gathered
gang.py     the processes of a run: who is there, what all agree on, who is gone
multihost.py  which process this is, jax between processes, whether they agree
votes.py    what processes tell one another beside the steps: to leave, who is slow
hlo.py      a compiled step's text -> its collectives, by mesh axis
describe.py the tables of layout.txt: collectives, parameters

May import jaxlm.config, jaxlm.settings and jax; knows no model. Start with rules.py.
"""
