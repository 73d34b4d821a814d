"""Bytes between two processes: frames, authentication, channels."""
