"""Statistics over several devices or program instances.

`named_axes` for vmap, pmap and shard_map, whose axes the user names; `sharded_arrays` for arrays
that lie on several devices under jit; `placement` for the shardings of arrays.
"""
