"""Tests of jbn/native/."""
