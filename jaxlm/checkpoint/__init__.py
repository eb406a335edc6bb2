"""Checkpoints of a run: saved in the background, committed by a rename, restored onto any mesh.

store.py     CheckpointStore: the writer of a run's directory, keeping the newest; the loop's one door. Start here.
restore.py   reading: which steps there are, does one fit, load it whole or its parameters alone; never writes
layout.py    what lies on disk: one directory a step, one named array a leaf; its junk and its temporary names
quiet.py     keeps Orbax's details out of the log

May import jaxlm.config, jaxlm.parallel, jax, numpy and Orbax; nothing outside this room imports Orbax. Directories are
on a file system that renames atomically (local disks, NFS, Lustre), not in an object store.
"""
