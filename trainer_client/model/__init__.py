"""Which tensors of a model are streamed, under which names.

- `dtypes`: which tensors can be streamed, and under which wire dtype
- `plan`: what one model's snapshot looks like, and where its tensors are found each time
- `roles`: which buffers are structural
- `selection`: which part of a model is streamed
- `sources`: where the tensors of a model live
- `wrappers`: wrappers put around modules for speed or distribution, whose names must not reach a c
"""
