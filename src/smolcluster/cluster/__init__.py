"""Who takes part: rendezvous, membership, heartbeats."""
