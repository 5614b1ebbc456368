"""Models that this project makes itself, small enough to train from scratch on a CPU in minutes.

They stand in for the large ones in runs that must need no hub: real data, real training, and every
stage after it as for any other model.
"""
