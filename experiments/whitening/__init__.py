"""Measures the cost of whitening, and its statistics, beside those of Batch Normalization."""
