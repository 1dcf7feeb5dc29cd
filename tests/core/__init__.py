"""Tests of jbn/_core/. Most files are named after the file that they test, some after a law."""
