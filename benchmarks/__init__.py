"""Measurements that back the numbers in the README."""
