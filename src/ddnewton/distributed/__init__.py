"""Several processes, one call: who leads, what passes between ranks, how a failure is told."""
