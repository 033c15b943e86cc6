"""What the rows of a log have to hold; without torch, whose import takes seconds."""

# The keys that readers of a row rely on, by its kind, and the types of other keys, where a row has
# them. An int is a count from 1; null stands for a number that was not finite.
NUMBER, NULLABLE, TEXT = (int, float), (int, float, type(None)), (str, type(None))
REQUIRED = {
    "run": {"flags": dict, "settings": dict},
    "epoch": {"epoch": int, "train_loss": NULLABLE, "train_acc": NUMBER, "test_loss": NULLABLE,
              "test_acc": NUMBER, "eta_mean": NULLABLE, "seconds": NUMBER},
    "step": {"epoch": int, "step": int},
}  # fmt: skip
OPTIONAL = {"resumed": list, "image_files": dict, "stopped": TEXT} | dict.fromkeys((
    "loss", "acc", "eta", "eta_min", "eta_max", "update", "update_min", "update_mean", "update_max",
    "length", "turn", "images_per_second", "tokens_per_second", "train_bits", "test_bits",
), NULLABLE)  # fmt: skip


def check(row, line, first):
    """Raises ValueError unless a row, the `first` of a log or another, has what readers rely on."""
    if not isinstance(row, dict):
        raise ValueError(f"line {line} is {repr(row)[:50]}, and no row")
    kind = row.get("kind")
    if not isinstance(kind, str) or first and kind != "run":
        wanted = 'not "run"' if first else "no name of a kind"
        has = f"{repr(kind)[:50]} for kind, {wanted}" if "kind" in row else "no kind"
        raise ValueError(f"line {line} has {has}")
    required = REQUIRED.get(kind, {})
    for key, types in (required | OPTIONAL).items():
        if key in required and key not in row:
            raise ValueError(f"line {line} has no {key}")
        if key in row and (not isinstance(row[key], types) or types is int and row[key] < 1):
            raise ValueError(f"line {line} has {repr(row[key])[:50]} for {key}")
