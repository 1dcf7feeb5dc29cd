"""The mathematics of Batch Normalization, in the order in which it is best read.

`axes` (which axes are features), `moments` (count, mean and variance of a batch, by sums of x minus
`shift`), `pooling` (joins the moments of parts), `affine` and `normalize` (y), `derivative` (the
one derivative rule), `running` (the statistics for inference), `batch_norm` (the composition).
Around them: `plan` and `check` (the arguments), `elementwise` (whether an activation mixes
elements), `deferral` (statistics that are updated after a step), `export`.
"""
