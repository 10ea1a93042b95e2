"""The model answers: replicas, micro-batching, deployments."""
