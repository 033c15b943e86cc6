"""Breaking runs of main.py at chosen and at random moments, and comparing what they end with."""
