"""Times beside their peers in the same run: `python -m scripts.benchmark`, see __main__.py."""
