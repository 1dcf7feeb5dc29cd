"""Tests of experiments/: the folders and files have the names of what they test."""
