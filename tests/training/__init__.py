"""Tests of jbn/training/."""
