"""What a command line chooses from, by name, without torch, whose import takes a second."""

LOSSES = ("mse", "xent")  # functions of training.losses
PRECISIONS = ("fp32", "tf32", "bf16")
SCHEDULES = ("constant", "cosine")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")  # packages, and kinds of runs.track
AUTOMATIC = {"agd": "AGD", "spectral": "SpectralAGD"}  # classes of agd.py, without a learning rate
BASELINES = {"adam": ("Adam", 1e-3), "sgd": ("SGD", 0.1)}  # of torch.optim, and default rates
OF_TORCH = (
    "Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "LBFGS", "Muon", "NAdam",
    "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam",
)  # fmt: skip
# a name in lower case -> the optimiser's, as settings and files have it
OPTIMIZERS = {x: x for x in (*AUTOMATIC, *BASELINES)}
OPTIMIZERS = OPTIMIZERS | {x.lower(): f"torch.optim.{x}" for x in OF_TORCH} | OPTIMIZERS
