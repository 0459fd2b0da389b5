"""Training of image classifiers, alone or as students of a teacher: what `train.py` runs."""
