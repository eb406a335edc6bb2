"""How arrays lie on devices: the mesh and the one table from logical dims to mesh axes.

rules.py    the table: logical dim -> mesh axes, computing and at rest
mesh.py     degrees -> Mesh
check.py    what a table must hold, and what it must not leave replicated
working.py  weights as a step holds them, in the compute dtype
dense.py    products with the model's weights: gathers, sums and scatters, placed by hand
gradients.py  their sums over devices, to where parameters rest, and their norm
context.py  attention over a mesh: how the positions of a row meet, chosen and differentiated
zigzag.py   one of the ways: a block of keys at a time, round a ring or gathered
gang.py     the processes of a run: who is there, what all agree on, who is gone
multihost.py  which process this is, jax between processes, whether they agree
votes.py    what processes tell one another beside the steps: to leave, who is slow
hlo.py      a compiled step's text -> its collectives, by mesh axis
describe.py the tables of layout.txt: collectives, parameters

What computes is local, written for one device's share: step.py enters the mesh (rules.Layout.on_mesh), the optimizer stays out.
May import jaxlm.config, jaxlm.settings and jax; knows no model. Start with rules.py.
"""
