"""What `smolcluster bench` measures: our collectives and algorithms beside those that people would use instead."""
