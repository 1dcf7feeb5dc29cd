"""Reading, changing, ordering and serving images."""
