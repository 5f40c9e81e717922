"""Requests as values: a body checked field by field, the precision that it wishes for, and the text of its answer."""
