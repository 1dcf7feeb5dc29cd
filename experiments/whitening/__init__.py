"""What whitening costs and brings beside Batch Normalization of each feature."""
