"""Tests of jbn/_devices/."""
