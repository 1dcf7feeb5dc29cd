"""Tests of jbn/_xla/."""
