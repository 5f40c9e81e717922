"""Deciders: what is hot, and how much memory there is to be had. Pure functions of values."""
