"""From memory to a durable generation on disk: drafts, the publisher thread, retention, and the ring.

- `writer`: writes the files of a draft, block by block, during a pass over the averages
- `publisher`: the thread that makes drafts durable and deletes what has expired
- `commit`: the crash-safe order in which a draft becomes a generation
- `retention`: which generations, and snapshots of a ring, are deleted
- `ring`: keeps snapshots of a run's power-function averages, to synthesize others from later
- `ring_snapshot`: the files of one snapshot of a ring
"""
