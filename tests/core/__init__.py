"""Tests of jbn/_core/: most files have the name of the file that they test, others of a law."""
