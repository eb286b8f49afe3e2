"""`pikv plan`: what a deployment takes before anything runs.

Memory and wire are arithmetic (`planner`), step times come from a cost model that is fitted to measured passes
(`costs`, `measure`), and more ranks than there are from a simulation (`simulate`).
"""
