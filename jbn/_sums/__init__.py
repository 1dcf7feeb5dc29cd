"""Implementations of the sums over a batch, which make up the cost of Batch Normalization.

`protocol` defines the interface, `Sums`. `xla` implements it by operations of JAX, `kernel` by a
registered kernel such as the C++ kernel of `jbn.native`. `choose` picks one for each layer.
"""
