"""`pikv eval`: what compression, eviction and sparse lookup cost, measured on a real model.

`tasks` makes prompts whose answers stand in one place of a long text, `snapshot` prefills each of them once,
`methods` turns the snapshot into a compressed cache (PiKV's, kvpress', transformers'), `run` asks the questions,
`report` counts, tabulates and draws.
"""
