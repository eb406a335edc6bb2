"""How gradients become updates: learning-rate schedules and the optimizers, all of them chains of optax's parts.

schedule.py    make_schedule: update number -> learning rate
optimizer.py   make_optimizer: direction (adamw, lion, adafactor, muon), then decay by role, then the learning rate
muon.py        which parameters are matrices, and Muon for them with AdamW for the rest in one state

May import jaxlm.config, jaxlm.parallel, jax, numpy and optax. Clipping and the finite check live in step.py, which
computes the global norm once. Start with optimizer.py.
"""
