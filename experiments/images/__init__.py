"""Reads, changes, orders and serves images."""
