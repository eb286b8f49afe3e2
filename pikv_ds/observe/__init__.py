"""What the cache did and holds, for people and for Prometheus."""
