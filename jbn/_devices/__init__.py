"""Statistics over several devices or program instances.

`named_axes` is for vmap, pmap and shard_map, whose axes the user names; `sharded_arrays` is for
arrays on several devices under jit; `placement` is for the shardings of arrays.
"""
