"""Tools around the runs; start each as `python -m scripts.NAME`."""
