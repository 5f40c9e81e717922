"""Modules on planes, their weights, and the registry that holds the levels of a model."""
