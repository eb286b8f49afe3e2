"""The cache. Imports torch, the ops and the policies only."""
