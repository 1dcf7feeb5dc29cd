"""Tests of experiments/. Each file is named after the part of experiments/ that it tests."""
