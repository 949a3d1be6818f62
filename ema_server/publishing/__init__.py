"""The publisher thread: from memory to a durable generation, retention and the ring.

- `commit`: turns files that were written, or those of an older generation, into a durable genera
- `publisher`: the publisher thread
- `retention`: which generations of a run, and snapshots of its ring, may go
- `ring`: a bounded ring of a run's power-function averages, so that others of the kind can be
- `ring_cuts`: which cuts of rings are still to be made
- `ring_snapshot`: one snapshot of a ring
- `writer`: the files of a generation while they are being written
"""
