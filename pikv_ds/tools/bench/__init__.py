"""`pikv bench`: the ops side by side with what people use today.

Everything is measured in one run, interleaved round by round, so that a slow minute of a shared
machine slows all contenders alike; what counts is the ratio of medians. Each contender walks
through copies of its data of more than a gigabyte together, so that caches do not help.
"""
