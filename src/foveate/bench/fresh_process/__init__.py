"""Measurements in a fresh process, so that its memory and its disk reads belong to the measured work alone."""
