"""Batch Normalization itself, in the order in which it is best read.

`axes` (which axes are features), `moments` (count, mean and variance of a batch, by sums of x minus
`shift`), `pooling` (moments of parts -> of the whole), `affine` and `normalize` (y), `derivative`
(the one derivative rule), `running` (the statistics for inference), `batch_norm` (the composition).
Around them: `plan` and `check` (arguments, and what can be wrong with them), `elementwise` (what an
activation may be), `deferral` (statistics that wait for other parts of a batch), `export`.
"""
