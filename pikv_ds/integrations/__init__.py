"""What ties the cache to frameworks: the only folder that imports transformers and deepspeed."""
