"""The crash test: main.py is broken at chosen and at random moments, and has to end to the bit."""
