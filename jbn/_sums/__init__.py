"""The sums over a batch, which are all that Batch Normalization costs: `Sums`, and who takes them.

`protocol` says what there is to compute, `xla` does it by operations of JAX, `kernel` by a kernel
that was registered, such as the C++ kernel of `jbn.native`, and `choose` picks one for each layer.
"""
