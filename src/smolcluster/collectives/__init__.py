"""Many processes act as one: communicators, collectives, gradient buckets."""
