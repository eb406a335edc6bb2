"""Checkpoints of a run: saved in the background, committed by a rename, verified on load, restored onto any mesh.

store.py      CheckpointStore: the writer of a run's directory; the loop's one door. Start here.
restore.py    reading: the newest sound step, one step, its parameters alone; never writes
lock.py       RunLock: one run a workdir, across hosts
layout.py     what lies on disk: one directory a step, one named array a leaf; which steps stay, what is moved aside
manifest.py   step.json, what a step says of itself: arrays with checksums, files with sizes, the caller's metadata
checksum.py   of an array, on the devices that hold it      staging.py   the copy in host memory that a save waits for
space.py      disk and memory that saves will need          __main__.py  python -m jaxlm.checkpoint: no run is needed

May import jaxlm.settings, jaxlm.config, jaxlm.parallel, jax, numpy and Orbax; nothing outside this room imports Orbax.
Directories are on a file system that renames atomically (local disks, NFS, Lustre), not in an object store.
"""
