"""The command line of main.py: its table of flags, and the settings that they stand for."""

import argparse
import importlib.util
import inspect
import os
import re
import sys

from architecture import GPTS, LIBRARIES, NETWORKS, SUFFIXES, Unfit, is_library
from cli import (
    Joined,
    Parser,
    UserError,
    a_path,
    all_or,
    checked,
    command,
    device,
    every,
    expand,
    near,
    number,
    on_or_off,
    one_of,
    synonyms,
)
from data import AUGMENTATIONS, DATASETS, TEXTS, default_data_dir, is_folder, is_text
from training.choices import (
    AUTOMATIC,
    BASELINES,
    LOSSES,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    TRACKERS,
)

# What `python main.py` alone trains: it needs no download, and takes seconds.
ALONE = ["--dataset", "digits", "--epochs", "20"]
MODES = ("auto", "on", "off")
LAYERS = ("count", "paths")
# Defaults that the data decide: of images and of a text.
OF_IMAGES = {"loss": "mse", "epochs": 200, "train_bs": 128}
OF_TEXT = {"loss": "xent", "epochs": 6, "train_bs": 16}
FCN = {"depth": 10, "width": 256}
EPOCH_STEPS = 250

# What people type elsewhere: what they mean here.
ARCHS = synonyms("""
fcn mlp fc dense linear fully_connected perceptron fcnet
vgg vgg16 vgg16_bn
gpt transformer lm nanogpt mingpt chargpt decoder
gpt2 gpt2_small gpt2_124m gpt_2
torchvision:vit_b_16 vit vit_b vit_base visiontransformer
torchvision:convnext_tiny convnext
torchvision:densenet121 densenet
torchvision:efficientnet_b0 efficientnet
torchvision:mobilenet_v3_small mobilenet mobilenet_v3
torchvision:swin_t swin
torchvision:resnext50_32x4d resnext resnext50
torchvision:wide_resnet50_2 wide_resnet wrn
torchvision:inception_v3 inception
""")
FAMILY = re.compile(  # of torchvision's networks
    "alexnet|convnext_|densenet|efficientnet_|googlenet|inception_|maxvit_|mnasnet|mobilenet_|"
    "regnet_|resnet[0-9]|resnext|shufflenet_|squeezenet|swin_|vgg[0-9]|vit_|wide_resnet"
)
SETS = synonyms("""
cifar10 cifar c10
cifar100 c100
imagenet imagenet_1k ilsvrc ilsvrc2012 in1k
digits sklearn load_digits optdigits
shakespeare shakespeare_char tinyshakespeare tiny_shakespeare chars
tokens:PATH openwebtext openwebtext2 owt webtext fineweb tokens bin
text:PATH text txt
""")
OBJECTIVES = synonyms("""
mse l2 square squared mse_loss square_loss mean_squared_error
xent ce cross_entropy cross_entropy_loss nll nll_loss softmax logloss
""")
ARITHMETIC = synonyms("""
fp32 float32 float full single 32 highest
tf32 tensorfloat32 high
bf16 bfloat16 fp16 float16 half amp mixed 16
""")
RULES = synonyms("""
agd automatic automatic_gradient_descent
spectral spectralagd
timm.optim.Lion lion
timm.optim.Lamb lamb
timm.optim.Lars lars
timm.optim.Adan adan
timm.optim.Adopt adopt
timm.optim.MADGRAD madgrad
""")
RATES = synonyms("""
constant const fixed flat none off no 0
cosine cos cosine_annealing cosine_annealing_lr cosine_decay cosine_with_warmup warmup_cosine on
""")
TRACKED = synonyms("""
tensorboard tb tboard tensorboardx
wandb weights_and_biases weightsandbiases wandb.ai w&b
trackio huggingface hf
mlflow databricks
""")
# Flags that people look for, and what stands in their place.
ABSENT = {
    "AGD finds the rate of each step, and a baseline has --lr and --schedule cosine":
        "lrdecay stepsize gamma lrgamma lrstepsize cosine decayrate decayepochs minlr lrmin "
        "milestones",
    "--warmup is a number of steps": "warmupepochs warmupratio warmupfraction",
    "AGD has none, and --optimizer package.Class takes a class with other defaults":
        "momentum nesterov betas beta1 beta2 beta eps epsilon dampening amsgrad",
    "AGD takes the gradient as it is":
        "clip clipgrad gradclip maxgradnorm gradientclipval clipnorm clipgradnorm gradclipping",
    "the same command resumes, a larger --epochs goes on from a finished run, and --weights FILE "
    "starts from a file":
        "resume resumefrom resumefromcheckpoint continue checkpoint ckpt load restore r "
        "autoresume loadcheckpoint",
    "a run has a number of --epochs, of a text each of --epoch_steps": "iters iterations maxiters "
        "maxiter maxsteps steps nsteps numsteps maxiterations numiters earlystopping patience "
        "maxtime",
    "each epoch ends with a test, and of a text it has --epoch_steps":
        "valinterval evalevery evalinterval evalsteps evaliters",
    "--evaluate RUN tests a checkpoint alone, and each epoch ends with a test":
        "test eval validate validation evalonly doeval testonly dotest evaluateonly",
    "the log is lines of JSON under --out, and scripts.plot draws it":
        "plot",
    "did you mean --track tensorboard?": "tensorboard tb usetensorboard tensorboardx",
    "did you mean --track wandb?":
        "wandb usewandb logwandb wandblog weightsandbiases",
    "did you mean --track trackio?": "trackio",
    "did you mean --track mlflow?": "mlflow usemlflow",
    "--track wandb reads its own variables, as WANDB_PROJECT":
        "project wandbproject wandbentity wandbrunname wandbname wandbmode",
    f"--track takes {', '.join(TRACKERS)}": "comet cometml neptune clearml aim swanlab dvclive",
    "all settings are flags": "config cfg yaml settings c hydra configfile",
    "the images have the number of classes": "numclasses nclasses classes nclass",
    "the networks and losses take no other setting": "droppath "
        "labelsmoothing smoothing mixup cutmix classweights",
    "--augment crop leaves out the flips, and --augment none all":
        "flip flips noflip noflips hflip nohflip noaugment noaugmentation noaug",
    "main.py trains without the word": "train run fit start",
    "a run's log has the commit and the versions of the packages": "version",
}  # fmt: skip


def arch_meant(value):
    value = value.lower()
    parts = re.fullmatch(r"(torchvision|timm)\W(?:models\W)?(\w.*)", value)
    if parts:
        return f"{parts[1]}:{parts[2]}"
    return ARCHS(value) or (f"torchvision:{value}" if FAMILY.match(value) else None)


def set_meant(value):
    if value.lower().endswith(".npz"):
        return f"npz:{value}"
    place = os.path.expanduser(value)
    if value.lower().endswith(".txt") or os.path.isfile(place):
        return f"text:{value}"
    if os.path.isfile(os.path.join(place, "train.bin")):
        return f"tokens:{value}"
    is_path = os.sep in value or os.path.isdir(place)
    return f"folder:{value}" if is_path and ":" not in value else SETS(value)


def optimizer(value):
    """An argument type: one of OPTIMIZERS, which makes adamw torch.optim.AdamW, or package.Class.
    """
    name = OPTIMIZERS.get(value.lower(), value)
    return name if "." in name else one_of(OPTIMIZERS, "package.", rest="Class", meant=RULES)(name)


optimizer.meant = lambda value: value if value.lower() in OPTIMIZERS else RULES(value)


def parser():
    """The command line: every flag with its type, default and help."""
    p = Parser(
        prog=command("main"),
        allow_abbrev=False,
        description="Train a network with Automatic Gradient Descent (AGD): no learning rate.",
        epilog="The same command goes on where the last one stopped; a larger --epochs goes on "
        "from a finished run, unless --schedule cosine has ended it. Without any flag: "
        f"{' '.join(ALONE)}.",
    )
    p.absent = {word: reason for reason, words in ABSENT.items() for word in words.split()}
    figures = f"{command('scripts.reproduce')} draws the figures, and --replay repeats a run"
    p.absent |= dict.fromkeys(("reproduce", "figure", "figures"), figures)
    add = p.add_argument_group("what to train").add_argument
    gpt, gpt2 = GPTS.values()
    add("--arch", type=one_of([*NETWORKS, *GPTS], *LIBRARIES, rest="NAME", meant=arch_meant),
        default="fcn", metavar="NET",
        help=f"{', '.join(NETWORKS)}; of a text {' or '.join(GPTS)}; torchvision:NAME or "
        "timm:NAME, a classifier of theirs, with their start of the weights (default: "
        "%(default)s)")
    add("--dataset", type=one_of([*DATASETS, TEXTS[0]], "folder:", "npz:", *TEXTS[1:],
                                 meant=set_meant),
        default="cifar10", metavar="SET",
        help=f"{', '.join(DATASETS)}; folder:PATH with train/ and val/; npz:FILE in --data_dir, "
        "with train_images (N, H, W), (N, H, W, C) or (N, C, H, W), train_labels, whole numbers, "
        "and the same of test; texts: shakespeare, text:FILE in UTF-8, tokens:FOLDER of train.bin "
        "and val.bin (default: %(default)s)")
    add("--loss", type=one_of(LOSSES, meant=OBJECTIVES), metavar="LOSS",
        help="mse (square loss) or xent (cross-entropy) (default: mse, of a text xent)")
    add("--depth", type=number(int, 1, 10_000), help="layers of the fcn, blocks of a gpt (default: "
        f"10, gpt {gpt.depth}, gpt2 {gpt2.depth})")
    add("--width", type=number(int, 1, 1_000_000), help="of the fcn or a gpt (default: 256, gpt "
        f"{gpt.width}, gpt2 {gpt2.width})")
    # None where the network's own default holds: what earlier runs have logged of them.
    switch = {"nargs": "?", "const": "on", "type": one_of(("on", "off"), meant=on_or_off),
              "metavar": "on|off"}  # fmt: skip
    add("--bias", **switch, help=f"biases in the layers of {', '.join(NETWORKS)} (default: off) or "
        "a gpt (on)")
    add("--affine", **switch, help="gains and biases in their norms likewise")
    add("--weights", type=a_path, metavar="FILE", help="weights to start from: .safetensors, .pt, "
        ".pth or .bin; those of another shape, as a head for other classes, are drawn")
    add("--freeze", action=Joined, metavar="PATTERN", help="leave the parameters of these names as "
        "they are, as 'features.*'; may be given several times")
    less = {"on": "default", "off": "none"}
    add("--augment", type=one_of(AUGMENTATIONS, meant=lambda x: less.get(on_or_off(x))),
        default="default", metavar="HOW", help="of the training images: default (the "
        "crops and flips of the data set), crop (no flips, where left and right differ) or none "
        "(default: default)")
    add("--train_examples", type=number(int, 1), metavar="N", help="the first N images alone")
    add("--test_examples", type=number(int, 1), metavar="N", help="in testing likewise; of a "
        "text the windows (default: all, of a text 2,000 at most)")
    add = p.add_argument_group("how").add_argument
    add("--epochs", type=number(int, 1), help="(default: 200, of a text 6)")
    add("--train_bs", type=number(int, 1), help="images a step, on all devices together, or "
        "windows of a text (default: 128, of a text 16)")
    add("--test_bs", type=number(int, 1), metavar="N", help="in testing (default: as many as pay "
        "on the device, halved where memory runs out)")
    add("--micro_bs", type=number(int, 1), metavar="N", help="images, or windows, that a device "
        "takes at a time, added up to a step (default: all, halved where memory runs out)")
    add("--sync_bn", action="store_true", help="batch-norm statistics over all the devices")
    add("--gain", type=number(float, 0, 1e30), default=1.0,
        help="multiplies the update of agd and spectral (default: 1)")
    add("--layers", type=one_of(LAYERS, meant=lambda x: "--depth" if x.isdigit() else None),
        metavar="HOW", help="AGD's number of layers: count (their "
        "number) or paths (the mean number on a path through the network) (default: count for agd "
        "on the four networks, else paths)")
    add("--optimizer", type=optimizer, default="agd", metavar="OPT",
        help=f"{', '.join([*AUTOMATIC, *BASELINES])}; a class of torch.optim, as adamw, or any "
        "package.Class, as of a file in this folder; agd is the paper's rule, spectral the one to "
        "train with (default: %(default)s)")
    add("--lr", type=number(float, 0, 1e30), help="a baseline's learning rate (default: adam "
        "0.001, sgd 0.1, the class's own)")
    add("--weight_decay", type=number(float, 0, 1e30), metavar="X", help="of a baseline, for "
        "tensors of two or more dimensions; others have none (default: the class's own, for all)")
    add("--schedule", type=one_of(SCHEDULES, meant=RATES), default="constant", metavar="HOW",
        help="of a baseline's rate: constant, or cosine (up in equal steps, then down to 0 at the "
        "last step of --epochs, so that another number of them is another run) (default: "
        "%(default)s)")
    add("--warmup", type=number(int, 0), metavar="N",
        help="steps up, of --schedule cosine (default: a twentieth of the run)")
    add("--seed", type=number(int, 0), default=0, help="weights, order, augmentation (default: 0)")
    add("--precision", type=one_of(PRECISIONS, meant=ARITHMETIC), default="fp32",
        metavar="P", help="fp32 (the paper's), tf32 (NVIDIA GPUs from Ampere on), bf16 (autocast; "
        "weights, loss and optimiser stay float32) (default: fp32)")
    add("--deterministic", action="store_true", help="the same bits each time on GPUs too "
        "(slower; an operation that has no such form is named)")
    add = p.add_argument_group("how fast (the same result, up to rounding)").add_argument
    modes = {"type": one_of(MODES, meant=on_or_off), "default": "auto", "metavar": "MODE"}
    add("--cuda_graph", **modes, help="a step as one CUDA graph: auto (where it is possible: one "
        "GPU, arrays, whole batches, agd or a baseline at a constant rate), on, off (default: "
        "auto)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--channels_last", **modes, help="layout of convolutions' weights: auto (on GPUs unless "
        "fp32, whose kernels are slower so), on, off (default: auto)")
    add("--profile", action="store_true", help="a table and traces of where the time goes")
    add = p.add_argument_group("where").add_argument
    add("--data_dir", default=default_data_dir(),
        help="data sets (default: $AGD_DATA or ~/.cache/agd)")
    add("--out", type=a_path, default="output", help="logs and checkpoints (default: %(default)s)")
    add("--save_every", type=checked(every), default="10m", metavar="EVERY", help="time or "
        "steps between two checkpoints (90s, 10m, 2h; 500), in addition to one after every epoch "
        "(default: 10m)")
    add("--keep_best", action="store_true", help="keep the checkpoint of the epoch with the least "
        "test loss, too: <out>/checkpoints/NAME.best.pt")
    add("--fresh", action="store_true", help="start over: delete the log and the "
        "checkpoints of an earlier run of the same name")
    add("--replay", type=a_path, metavar="FILE", help="repeat the run of a record, "
        "<out>/logs/NAME.run.json, and compare the bits; with it, only --out (default: replayed), "
        "--data_dir, --device, --cpu and another place of its data or its --weights may be "
        "given")
    add("--evaluate", type=a_path, metavar="RUN", help="test the newest checkpoint of a run, and "
        "train nothing: RUN is its log, record or name, or a checkpoint, as NAME.best.pt; with it, "
        "only --out (where a name is looked for), --data_dir, --device, --cpu, --distribute, "
        "--precision, --test_bs, --workers and another place of its data may be given")
    add("--device", type=device, help="as torch spells it (default: a GPU if there is one)")
    add("--cpu", action="store_true", help="the same as --device cpu")
    add("--distribute", action="store_true", help="many devices: under torchrun, srun or mpirun")
    add("--check", action="store_true", help="look for what would stop the run, and do not run")
    add = p.add_argument_group("image folders").add_argument
    add("--image_size", type=number(int, 32, 8192), help="side in pixels (default: 224)")
    add("--workers", type=number(int, 0, 1024), default=min(8, os.cpu_count() or 1),
        help="processes that decode images (default: %(default)s)")
    add("--skip_bad_images", action="store_true", help="leave out images that cannot be decoded")
    add = p.add_argument_group("texts").add_argument
    add("--heads", type=number(int, 1, 10_000),
        help=f"of attention (default: gpt {gpt.heads}, gpt2 {gpt2.heads})")
    add("--context", type=number(int, 1, 2**20), help="tokens in a window (default: gpt "
        f"{gpt.context}, gpt2 {gpt2.context})")
    add("--dropout", type=number(float, 0, 0.99), default=0.0, metavar="P",
        help="of embeddings, attention and branches (default: 0)")
    add("--tied", **switch, help="whether the head's weight is the embedding (default: gpt off, "
        "gpt2 on)")
    add("--vocab", type=number(int, 2, 2**31 - 1), metavar="N", help="tokens in the vocabulary of "
        "tokens:FOLDER (default: that of its meta.json)")
    add("--epoch_steps", type=number(int, 1), metavar="N", help="steps of an epoch, after which "
        f"the loss on the validation text is measured (default: {EPOCH_STEPS})")
    add = p.add_argument_group("log").add_argument
    add("--log_steps", nargs="?", const="all", type=all_or(number(int, 1)), metavar="EPOCHS",
        help="a row a step beside the row an epoch, in the first EPOCHS or in all")
    add("--log_updates", action="store_true",
        help="how large the updates are, relative to the weights")
    add("--track", type=one_of(TRACKERS, meant=TRACKED), metavar="TRACKER", help="forward the log "
        f"to a tracker of experiments: {', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}; its files are "
        "in --out, unless its own variables name another place")
    return p


def words(p, flags):
    """The words of the command line that set `flags`, a dict of all of them, beyond their defaults.
    Flags that concern an earlier run or the screen are left out."""
    passing = ("out", "fresh", "profile", "check", "cpu", "save_every", "keep_best", "replay",
               "evaluate", "track")  # fmt: skip
    given = {name: x for name, x in flags.items() if x is not None}
    every = {action.dest: action.default for action in p._actions} | given
    line, own = [], own_defaults(argparse.Namespace(**every))
    for action in p._actions:
        value = flags.get(action.dest, action.default)
        if value is False and action.const == "on":
            value = "off"
        default = own.get(action.dest, action.default)
        if action.dest in passing or value == default or value is None or value is False:
            continue
        flag = action.option_strings[-1]
        line.append(flag if value is True else f"{flag}={value}")
    return line or [f"--dataset={p.get_default('dataset')}"]  # no words at all are ALONE


def command_of(flags):
    """The words of the command line that make the run of `flags` again. Records of earlier commits
    hold flags without effect, which a command line may not have."""
    p, idle = parser(), without_effect(argparse.Namespace(**flags))
    return words(p, {name: p.get_default(name) if name in idle else x for name, x in flags.items()})


def without_effect(args):
    """{name: reason} of the flags that ask for something that the run of `args` has not. What rules
    something out, as --cuda_graph off, or says where things lie, as --data_dir, holds for any run.
    """
    idle = {}
    library, automatic = is_library(args.arch), args.optimizer in AUTOMATIC

    def need(met, reason, *names):
        idle.update(dict.fromkeys(() if met else names, reason))

    gpt, text = args.arch in GPTS, is_text(args.dataset)
    need(args.arch == "fcn" or gpt, f"is for the fcn and the gpt: {args.arch} has its own",
         "depth", "width")  # fmt: skip
    need(gpt, f"is for the gpt, and {args.arch} has none", "heads")
    need(gpt or not args.dropout, f"is for the gpt, and {args.arch} takes none", "dropout")
    need(gpt or not args.tied, f"is for the gpt, and {args.arch} has no embedding", "tied")
    need(text, f"is for texts, and {args.dataset} has images", "context", "epoch_steps")
    need(args.dataset.startswith("tokens:"), "is for tokens:FOLDER", "vocab")
    own = f"is for {', '.join([*NETWORKS, *GPTS])}; {args.arch} has"
    need(not library, f"{own} biases of its own", "bias")
    need(not library, f"{own} norms of its own", "affine")
    need(args.arch != "fcn" or not args.affine, "is for networks with norms, and the fcn has none",
         "affine")  # fmt: skip
    need(args.distribute, "goes with --distribute: one device has the whole batch", "sync_bn")
    need(not (args.arch == "fcn" or gpt) or args.channels_last != "on",
         f"on is for convolutions, and the {args.arch} has none", "channels_last")  # fmt: skip
    need(args.freeze is not None, "names no parameter", "freeze")
    need((args.micro_bs or 0) < args.train_bs,
         f"is not below --train_bs {args.train_bs} and changes no step: leave it out",
         "micro_bs")  # fmt: skip
    folder = is_folder(args.dataset)
    need(folder, f"is for imagenet and folder:PATH, not {args.dataset}",
         "image_size", "workers", "skip_bad_images")  # fmt: skip
    need(not folder, f"is for the prepared sets, not for {args.dataset}",
         "train_examples", "test_examples")  # fmt: skip
    need(not text, f"is for images: an epoch of {args.dataset} has --epoch_steps",
         "train_examples")  # fmt: skip
    spec = DATASETS.get(args.dataset)
    need(args.augment == "default" or (spec is None or spec.flip) and not text,
         f"{args.augment}: {args.dataset} is not augmented", "augment")  # fmt: skip
    need(automatic, f"is AGD's; {args.optimizer} has --lr", "gain")
    need(automatic, f"is AGD's; {args.optimizer} does not ask for their number", "layers")
    own = AUTOMATIC.get(args.optimizer)
    need(not automatic, f"is for the baselines: {own} has no learning rate (--gain scales its "
         "update)", "lr")  # fmt: skip
    need(not automatic, f"is for the baselines: {own} needs no weight decay", "weight_decay")
    need(args.schedule != "constant", "goes with --schedule cosine", "warmup")
    for name in ("schedule", "warmup"):  # a constant rate holds for any run
        need(not automatic or (name, args.schedule) == ("schedule", "constant"),
             f"is for the baselines: {own} finds the rate of each step", name)  # fmt: skip
    return idle


def replayed(p, args, argv):
    """The Namespace of --replay FILE: the record's flags, and --out, --data_dir, the device and
    places of the images and the weights as given beside it. Flags without effect, which earlier
    commits took, stay as they were: the log has them."""
    given = p.given(argv)
    allow(p, given, "--replay", "record", "dataset", "weights")
    from runs.record import RecordError, read  # with torch

    try:
        record = read(args.replay)
    except RecordError as error:
        p.error(str(error))
    check_flags(p, args, given, "--replay", "record", args.replay, record["flags"],
                record["code"]["commit"])  # fmt: skip
    if not record["results"]:
        p.error(f"{args.replay} is of a run that has not finished: there is no result")
    # The last result is compared, also where more epochs were requested.
    flags = {**record["flags"], "epochs": record["results"][-1]["epochs"]}
    args = repeated(p, args, given, flags)
    args.out, args.fresh, args.replay = given.get("out", "replayed"), True, given["replay"]
    return args


def evaluated(p, args, argv):
    """The Namespace of --evaluate RUN: the flags of the log's first row, of which the device may be
    another one, and what may be given beside it."""
    given = p.given(argv)
    allow(p, given, "--evaluate", "log", "dataset", "distribute", "precision", "test_bs", "workers")
    import torch

    from runs.log import RunError
    from training.saved import find, first_row

    try:
        log, _ = find(args.evaluate, args.out)
        first = first_row(log)
    except RunError as error:
        p.error(str(error))
    then = first["flags"]
    check_flags(p, args, given, "--evaluate", "log", log, then, first.get("commit"))
    flags = {**then, "distribute": False, "compile": False, "cuda_graph": "auto"}
    ran = str(then.get("device"))
    if ran.startswith("cuda") and not torch.cuda.is_available():  # on another machine
        flags["device"] = "cpu"
    if ("cpu" if "cpu" in given else given.get("device") or flags.get("device")) != ran:
        flags["test_bs"] = None  # the device's own
    args = repeated(p, args, given, flags)
    args.out, args.evaluate = given.get("out", args.out), given["evaluate"]
    return args


def allow(p, given, flag, source, *names):
    """Refuse a flag beside one that takes all of them from the files of a run, except `names` and
    those of the place."""
    names = (flag.lstrip("-"), "out", "data_dir", "device", "cpu", *names)
    odd = [x for x in given if x not in names]
    if odd:
        p.error(f"{flag} takes a run's flags from its {source}: leave out --{odd[0]}")


def check_flags(p, args, given, flag, source, path, then, commit):
    """Refuse places of other data than those of the flags `then` of the file `path`, and flags that
    there are no more."""
    from runs.record import placeless, shown

    same = placeless(then)
    places = [x for x in ("dataset", "weights") if x in given]
    odd = [x for x in places if same.get(x) != placeless(given).get(x)]
    if odd:
        p.error(f"{flag} takes a run's flags from its {source}: leave out --{odd[0]}")
    odd = [key for key in then if key not in vars(args)]
    if odd:
        p.error(f"{path} has --{shown(odd[0])}, which no longer exists; its commit has it: "
                f"{shown(commit)}")  # fmt: skip


def repeated(p, args, given, flags):
    """The Namespace of the flags of a run, and of those given beside it."""
    flags = flags | ({"device": None} if "cpu" in given else {}) | given
    if not os.path.isdir(os.path.expanduser(str(flags.get("data_dir")))):  # another machine's
        flags["data_dir"] = args.data_dir
    args = p.parse_args(words(p, flags))
    args.cpu = "cpu" in given
    return args


def layers(args):
    """How AGD finds L, one of LAYERS: as requested, or the default; the paper counts the weights of
    its networks."""
    paper = args.optimizer == "agd" and args.arch in NETWORKS
    return args.layers or ("count" if paper else "paths")


def settings(args):
    """[(flag, value)] of the flags that are not at their defaults, and the device."""
    hidden = {"cpu"} | ({"test_bs"} if args.test_bs == test_batch(args) else set())
    hidden |= {key for key, x in own_defaults(args).items() if getattr(args, key) == x}
    defaults = {x.dest: x.default for x in parser()._actions if x.dest not in hidden}
    off = "bias", "affine", "tied"  # None is their default
    words = {False: "off", True: "on"}
    return [(key, words[value] if key in off else value) for key, value in vars(args).items()
            if value is not None and value != defaults.get(key, value)]  # fmt: skip


def own_defaults(args):
    """{name: default} of the flags whose defaults depend on the network and the data."""
    own = OF_TEXT if is_text(args.dataset) else OF_IMAGES
    size = GPTS.get(args.arch)
    return own | (FCN if size is None else {"depth": size.depth, "width": size.width})


def implied(args):
    """{name: default} of the flags that depend on the network likewise and are None there, as
    earlier runs have logged them."""
    if args.arch not in GPTS:
        return {"bias": False, "affine": False}
    heads, context, tied = GPTS[args.arch][2:]
    return {"heads": heads, "context": context, "tied": tied, "bias": True, "affine": True,
            "epoch_steps": EPOCH_STEPS}  # fmt: skip


def full(args, *names):
    """The values of flags, {name: value}, with what None stands for."""
    own = implied(args)
    given = {name: getattr(args, name) for name in names}
    return {name: own.get(name) if x is None else x for name, x in given.items()}


def network(args):
    """The keywords of architecture.build."""
    names = "depth", "width", "heads", "dropout", "tied", "bias", "affine"
    return full(args, *names[:2], *names[2 if args.arch in GPTS else 5 :])


def windows(args):
    """The keywords of data.load for a text, {} of images."""
    if not is_text(args.dataset):
        return {}
    return {**full(args, "context", "epoch_steps"), "vocabulary": args.vocab}


def drawn(args):
    """Whether AGD draws the weights: not those of a file or a library, and not of a head that is
    the embedding, whose rows would give outputs of a size of sqrt(width)."""
    return not (args.weights or is_library(args.arch) or network(args).get("tied"))


def test_batch(args):
    """The test batch that is about as fast as any, as measured: on a CPU activations stay in its
    caches; on a GPU a batch occupies all of it."""
    if not args.device.startswith("cuda"):
        if is_text(args.dataset):  # logits take most of the memory, and more of them no less time
            return args.train_bs
        return 1000 if args.arch == "fcn" else 64
    if is_text(args.dataset):
        return 4 * args.train_bs
    return 4 * args.train_bs if is_folder(args.dataset) else 10_000


def no_graph(args):
    """Why a step cannot be a CUDA graph, in words, or None."""
    if not args.device.startswith("cuda"):
        return "it takes a CUDA device"
    if args.distribute:
        return "it takes a single process"
    if is_folder(args.dataset):
        return "it takes a data set of arrays"
    if args.micro_bs is not None:
        return "it takes whole batches, without --micro_bs"
    if "." in args.optimizer:
        return f"{args.optimizer} may read from the device"
    if args.schedule != "constant":
        return f"--schedule {args.schedule} changes the rate in every step"
    return None


def parse(argv=None, check=True):
    """The Namespace of the command line, complete and consistent. `check`: also refuse a device or
    a package that this machine lacks."""
    p, args = read(argv, check)
    on_this_machine(p, args, check)
    if args.test_bs is None:
        args.test_bs = test_batch(args)
    if check and args.cuda_graph == "on" and no_graph(args):
        p.error(f"--cuda_graph on: {no_graph(args)}")
    return args


def alone(argv=None):
    """Whether the command line has no words."""
    return not (sys.argv[1:] if argv is None else argv)


def read(argv=None, check=True):
    """(the parser, the Namespace of the command line) as far as torch is not needed, which takes a
    second to import: a mistake is refused before. With `check` absent files are, too."""
    p, argv = parser(), ALONE if alone(argv) else argv
    if "--distribute" in (sys.argv if argv is None else argv):
        from distributed.launch import is_first  # with torch

        p.silent = not is_first()  # rank 0 prints
    args = p.parse_args(argv)
    if args.replay is None and args.evaluate is None:
        resolve(p, args)
        p.refuse(argv, without_effect(args))
    else:
        args = (evaluated if args.replay is None else replayed)(p, args, argv)
        resolve(p, args)
    if args.cpu:
        if args.device not in (None, "cpu"):
            p.error(f"--cpu contradicts --device {args.device}")
        args.device = "cpu"
    if args.optimizer in BASELINES and args.lr is None:
        args.lr = BASELINES[args.optimizer][1]
    asked, args.layers = args.layers, None
    if asked != layers(args):  # the default has one name, whether or not it is given
        args.layers = asked
    if args.weights is not None and not args.weights.endswith(SUFFIXES):
        whole = ("; of a model in a folder give model.safetensors, and save one in shards as one "
                 "file (max_shard_size)")  # fmt: skip
        many = os.path.isdir(args.weights) or args.weights.endswith(".index.json")
        p.error(f"--weights {args.weights} is none of {', '.join(SUFFIXES)}{whole if many else ''}")
    if check and args.track and importlib.util.find_spec(args.track) is None:
        p.error(f"--track {args.track} takes the package {args.track}, which is not installed: "
                f"pip install {args.track}, or \".[track]\" for all trackers")
    starts = check and args.evaluate is None
    if starts and args.weights is not None and not os.path.isfile(args.weights):
        p.error(f"--weights: there is no file {args.weights}")
    if is_folder(args.dataset):
        args.image_size = args.image_size or 224
    kind, _, given = args.dataset.partition(":")
    if kind in ("folder", "npz", "text", "tokens"):
        try:
            given = expand(given)
        except UserError as error:
            p.error(f"--dataset: {error}")
    if kind in ("folder", "text", "tokens"):  # a name that holds for every account
        given, home = os.path.abspath(given), os.path.expanduser("~") + os.sep
        given = "~/" + given[len(home) :] if given.startswith(home) else given
        args.dataset = f"{kind}:{given}"
    return p, args


def resolve(p, args):
    """Give the flags whose defaults depend on the network and the data their values."""
    for key, x in own_defaults(args).items():
        if getattr(args, key) is None:
            setattr(args, key, x)
    for key in ("bias", "affine", "tied"):
        setattr(args, key, {"on": True, "off": False}.get(getattr(args, key)))
    for key, x in implied(args).items():
        if getattr(args, key) == x:
            setattr(args, key, None)
    if args.arch == "fcn" and args.depth < 2:
        p.error("--depth of the fcn is a whole number from 2 on")
    if is_text(args.dataset) != (args.arch in GPTS):
        p.error(f"--arch {args.arch} takes images, and {args.dataset} is a text: --arch gpt"
                if is_text(args.dataset) else
                f"--arch {args.arch} takes texts, and {args.dataset} has images: --dataset "
                "shakespeare")  # fmt: skip


def on_this_machine(p, args, check):
    """Choose the device; with `check` refuse one, or a package, that is not here."""
    import torch  # behind what needs none

    from training.precision import lacks_tf32

    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    # Of several ranks each takes a GPU of its own later; this would touch the first one.
    probe = check and not (args.distribute and args.device == "cuda" and torch.cuda.is_available())
    try:
        torch.empty(0, device=args.device if probe else "cpu").cpu()
    except (RuntimeError, AssertionError) as error:  # meta has no .cpu()
        reason = str(error).splitlines()[0].split(". ")[0]
        if reason.startswith("Expected one of"):  # and 24 more
            reason = "torch has cpu, cuda, mps, xpu" + near(args.device, ["cuda", "mps"])
        if reason.startswith("Cannot copy out of meta"):
            reason = "its tensors hold no numbers"
        p.error(f"no device {args.device!r} here: {reason}")
    if check and args.optimizer not in (*AUTOMATIC, *BASELINES):
        from training.foreign import optimizer_class

        try:
            takes = inspect.signature(optimizer_class(args.optimizer)).parameters.values()
        except ValueError as error:
            p.error(str(error))
        for flag, key, asked in (
            ("lr", "lr", args.lr is not None),
            ("weight_decay", "weight_decay", args.weight_decay is not None),
            ("schedule", "lr", args.schedule != "constant"),
        ):  # fmt: skip
            if asked and not any(x.name == key or x.kind == x.VAR_KEYWORD for x in takes):
                lacks = "learning rate" if key == "lr" else "weight decay"
                p.error(f"--{flag}: {args.optimizer} has no {lacks}")
    if check and is_library(args.arch):
        from architecture import libraries

        library, _, name = args.arch.partition(":")
        try:
            names = libraries.names(library)
        except Unfit as error:
            p.error(f"--arch {error}")
        if name not in names:
            p.error(f"{library} has no classifier {name!r}{near(name, names)}")
    if probe and args.precision == "tf32" and lacks_tf32(torch.device(args.device)):
        p.error(f"--precision tf32: device {args.device} has none; NVIDIA GPUs from Ampere on do")


def check_network(args, net):
    """Raise Unfit for a flag without effect on `net`, which a library may have built."""
    from torch.nn.modules.batchnorm import _BatchNorm

    if args.replay is not None or args.evaluate is not None:  # of a run that was made so
        return
    if args.sync_bn and not any(isinstance(x, _BatchNorm) for x in net.modules()):
        raise Unfit(f"--sync_bn is for networks with batch norm, and {args.arch} has none")
    if args.channels_last == "on" and not any(p.ndim == 4 for p in net.parameters()):
        raise Unfit(f"--channels_last on is for convolutions, and {args.arch} has none")
