"""Policies: small frozen dataclasses with one method each, chosen by a plain dict in their file."""
