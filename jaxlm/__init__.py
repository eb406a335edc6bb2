"""jaxlm trains GPT-style language models in JAX: the same numbers on every mesh and after every fault.

Rooms, top to bottom; a room imports only from rooms below it (pyproject.toml holds the contract):
  train.py                                      the loop: start reading here
  opening.py                                    how the processes of a run open it; what may change between two starts
  tuning.py                                     model.remat=auto: what the backward reuses, by measurement
  evaluate.py generate.py report.py             tools over a finished or running workdir
  launch.py doctor.py                           starting several processes; looking at a machine
  plan/                                         what a config would do, before any device is touched
  header.py                                     what a run says of itself before its first step
  compiled.py                                   the step as a compiled program: what it needs and sends
  session.py                                    what the loop and the tools both open: settings, the program, parameters
  step.py                                       one update: model x loss x optimizer x mesh
  models/ data/ optim/ checkpoint/ metrics/     five rooms, blind to each other
  parallel/                                     mesh, sharding table, attention over a mesh, several processes
  guards.py                                     signals, watchdog, errors on the way out
  settings.py checks.py config.py               from files and flags to frozen dataclasses
  files.py                                      files that appear whole or not at all
"""

__version__ = "0.1.0"
