"""What a user may get wrong: one sentence with the noun, and exit code 2. The readers of data,
records and logs have tests of their own; here a command of each meets a file or two."""

import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import flags
import scripts.benchmark.__main__ as benchmark
from architecture import Unfit
from runs.checkpoint import pack, unpack
from scripts import reproduce
from scripts.experiments import SCALES, experiments
from scripts.gpu_checks import ALL, WORDS
from tests.conftest import ROOT

PROGRAMS = {
    "main": "main", "prepare": "data.prepare", "benchmark": "scripts.benchmark.__main__",
    "watch": "scripts.watch.__main__",
    **{name: f"scripts.{name}" for name in
       ("plot", "reproduce", "scaling", "experiments", "gpu_checks", "spectral", "any_model")},
}  # fmt: skip
SMALL = "--cpu --depth 2 --width 4 --epochs 1 --train_bs 2 --out {tmp}/out"
DIGITS = f"main --dataset digits {SMALL} --train_bs 64 --train_examples 128 --test_examples 64"
ON = f"{DIGITS} --epochs 3"  # goes on from `ran`
FOLDER = f"main --dataset folder:{{tmp}}/images {SMALL} --image_size 32 --workers 0"
NPZ = f"main --dataset npz:set.npz --data_dir {{tmp}} {SMALL}"
GPT = f"{SMALL} --arch gpt --context 8"
TEXT, TOKENS = (f"main --dataset {x} {GPT}" for x in ("text:{tmp}/a.txt", "tokens:{tmp}/t"))
REPLAY, PLOT = "main --replay {tmp}/x.json", "plot {tmp}/x.jsonl"
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such files")


def run(command, tmp):
    """The exit code of a command, run in this process."""
    name, *words = shlex.split(command.format(tmp=tmp))
    try:
        return importlib.import_module(PROGRAMS[name]).main(words) or 0
    except SystemExit as end:
        return end.code


@pytest.fixture
def check(tmp_path, capfd, monkeypatch):
    """f(command, noun, code=2): run it; it ends with that code and one sentence with the noun."""
    monkeypatch.delenv("IMAGENET_PATH", raising=False)

    def check(command, noun, code=2):
        capfd.readouterr()
        ended = run(command, tmp_path)
        out, message = capfd.readouterr()
        assert ended == code, message
        assert "Traceback" not in out + message and not (tmp_path / "canary").exists()
        if code == 0:
            assert "error" not in message
            return
        message = re.sub(r"\n +python .+ --help lists the flags\n$", "\n", message)
        *before, sentence = message.replace(str(tmp_path), "TMP").strip().splitlines()
        assert sentence.startswith("error: ") and len(sentence) <= 400, sentence
        assert noun in sentence
        assert all(re.match(r"Looking through|.*B/s\]|$", line) for line in before), message

    return check


def table(*cases):
    """Parameters of cases (..., noun, ...), whose nouns are their ids."""
    return [pytest.param(*case, id=f"{i}: {case[1]}"[:60]) for i, case in enumerate(cases)]


FLAGS = f"""
{DIGITS} --widht 3                              | did you mean --width
{DIGITS} --epoch 3                              | did you mean --epochs
{DIGITS} --trainbs=3                            | did you mean --train_bs
{DIGITS} --batch_size 64                        | did you mean --train_bs
{DIGITS} --batch-size=64                        | did you mean --train_bs
{DIGITS} -b 64                                  | did you mean --train_bs
{DIGITS} --learning-rate 0.1                    | did you mean --lr
{DIGITS} --model fcn                            | did you mean --arch
{DIGITS} --data digits                          | did you mean --dataset
{DIGITS} --gpu 0                                | did you mean --device
{DIGITS} --gpus 2                               | did you mean --distribute
{DIGITS} --local-rank=0                         | did you mean --distribute
{DIGITS} -j 4                                   | did you mean --workers
{DIGITS} --num_workers 4                        | did you mean --workers
{DIGITS} --log_dir x                            | did you mean --out
{DIGITS} --output x                             | did you mean --out
{DIGITS} --pretrained                           | did you mean --weights
{DIGITS} --n_epochs 3                           | did you mean --epochs
{DIGITS} --image-size 64                        | did you mean --image_size
{DIGITS} --resume                               | the same command resumes
{DIGITS} --weight_decay 0.1                     | AGD needs no weight decay
{DIGITS} --wd 0.1                               | did you mean --weight_decay
{DIGITS} --lr_schedule cosine                   | did you mean --schedule
{DIGITS} --scheduler cosine                     | did you mean --schedule
{DIGITS} --warmup_steps 5                       | did you mean --warmup
{DIGITS} --min-lr 1e-5                          | finds the rate of each step
{DIGITS} --momentum 0.9                         | AGD has none
{DIGITS} --warmup-epochs 5                      | --warmup is a number of steps
{DIGITS} --save_best                            | did you mean --keep_best
{DIGITS} --eval_only                            | --evaluate RUN tests a checkpoint alone
{DIGITS} --wandb                                | did you mean --track wandb?
{DIGITS} --tensorboard                          | did you mean --track tensorboard?
{DIGITS} --use-mlflow                           | did you mean --track mlflow?
{DIGITS} --report_to trackio                    | did you mean --track?
{DIGITS} --wandb_project x                      | reads its own variables, as WANDB_PROJECT
{DIGITS} --comet                                | --track takes tensorboard, wandb, trackio, mlflow
{DIGITS} --track tb                             | did you mean tensorboard?
{DIGITS} --track comet                          | tensorboard, wandb, trackio, mlflow
{DIGITS} --eval_every 3                         | each epoch ends with a test
{DIGITS} --zzz                                  | there is no flag --zzz
main digits                                     | did you mean --dataset digits
main resnet18                                   | did you mean --arch resnet18
main CIFAR-10                                   | did you mean --dataset cifar10
main set.npz                                    | did you mean --dataset npz:set.npz
main {{tmp}}                                    | did you mean --dataset folder:
main AdamW                                      | did you mean --optimizer AdamW
main 50                                         | no place for 50
main train                                      | main.py trains without the word
main reproduce Figure5                          | scripts.reproduce draws
main –-epochs 3                                | did you mean --epochs
main —epochs=3                                 | did you mean --epochs
{DIGITS} --no-bias                              | no flag --no-bias; did you mean --bias off
{DIGITS} --no_flip                              | --augment crop leaves out the flips
{DIGITS} --version                              | a run's log has the commit
{DIGITS} --bias true                            | --bias: no 'true' among on, off; did you mean on
{DIGITS} --fresh 0                              | --fresh takes no value: leave out --fresh 0
{DIGITS} --cpu=True                             | error: --cpu takes no value
main --epochs                                   | --epochs: expected one argument
main --epochs 0                                 | '0' is not a whole number from 1
main --epochs {"9" * 5000}                      | --epochs
main --train_bs 1.5                             | '1.5' is not a whole number
main --epochs 1e400                             | '1e400' is not a whole number
main --micro_bs 128                             | --micro_bs is not below --train_bs
main --depth 1000000000                         | from 1 to 10000
main --seed 10000000000000000000                | --seed
main --gain nan                                 | finite
main --optimizer sgd --lr 1e39                  | from 0 to 1e+30
main --arch resnet                              | did you mean resnet
main --arch ResNet-18                           | did you mean resnet18
main --arch resnet34                            | did you mean torchvision:resnet34
main --arch timm/ResNet18                       | did you mean timm:resnet18
main --arch torchvision.models.resnet18         | did you mean torchvision:resnet18
main --arch timm:                               | did you mean timm:NAME
main --arch vit                                 | did you mean torchvision:vit_b_16
main --arch mlp                                 | did you mean fcn
main --loss cross_entropy                       | did you mean xent
main --dataset CIFAR-10                         | did you mean cifar10
main --dataset cifar                            | did you mean cifar10
main --dataset fashion-mnist                    | folder:PATH, npz:PATH
main --dataset {{tmp}}                          | did you mean folder:
main --dataset ./pictures                       | did you mean folder:./pictures
main --dataset set.npz                          | did you mean npz:set.npz
main --dataset SET.NPZ                          | did you mean npz:SET.NPZ
main --dataset folder:                          | did you mean folder:PATH
main --dataset npz:                             | did you mean npz:PATH
main --dataset text:                            | did you mean text:PATH
main --dataset book.txt                         | did you mean text:book.txt
main --dataset tinyshakespeare                  | did you mean shakespeare
main --dataset shakespeare                      | --arch fcn takes images, and shakespeare is a text
main --dataset text:x --arch resnet18           | --arch resnet18 takes images, and text:
main --arch gpt --dataset digits                | --arch gpt takes texts, and digits has images
main --arch gpt2                                | --arch gpt2 takes texts, and cifar10 has images
main --arch nanogpt                             | did you mean gpt
main --dataset shakespeare {GPT} --heads 3      | 3 heads do not divide a width of 4
main --dataset shakespeare {GPT} --context 0    | '0' is not a whole number from 1
main --dataset shakespeare {GPT} --dropout 1    | from 0 to 0.99
main --dataset openwebtext                      | did you mean tokens:PATH
main --dataset shakespeare {GPT} --epoch_steps 1e8 | an epoch of 200,000,000 windows is longer than
main --dataset shakespeare {GPT} --context 200000 | the validation part of shakespeare has 111,540
main --dataset shakespeare {GPT} --test_examples 99999 | has 13,942 windows for --test_examples
{TEXT}                                          | there is no file
{TOKENS}                                        | there is no folder
main --optimizer nowhere.Class --dataset digits | nowhere
main --optimizer SpectralAGD                    | did you mean spectral
main --optimizer lion                           | did you mean timm.optim.Lion
main --optimizer optim.AdamW --cpu              | did you mean torch.optim.AdamW
main --optimizer torch.AdamW --cpu              | did you mean torch.optim.AdamW
main --layers 5                                 | did you mean --depth
main --optimizer os.system --cpu                | no optimiser
main --optimizer torch.optim.LBFGS --cpu        | several passes a step
{DIGITS} --optimizer torch.optim.Optimizer      | does not take these weights
{DIGITS} --optimizer torch.optim.SparseAdam     | does not support dense gradients
main --optimizer lbfgs --cpu                    | torch.optim.LBFGS
main --optimizer adamww --cpu                   | did you mean adamw
main --optimizer torch.optim.adamw --cpu        | did you mean AdamW
main --optimizer torch.optim.lr_scheduler.StepLR | no optimiser; torch.optim.AdamW
main --optimizer .SGD --cpu                     | no optimiser
main --optimizer ..SGD --cpu                    | no optimiser
main --optimizer agd.AGD --cpu                  | --optimizer agd
main --optimizer agd.SpectralAGD                | --optimizer spectral
main --precision fp16                           | fp32, tf32, bf16
main --cpu --precision tf32                     | Ampere
main --lr 0.1                                   | AGD has no learning rate
main --optimizer spectral --lr 0.1              | SpectralAGD has no learning rate
main --optimizer adam --gain 2                  | --lr
main --optimizer spectral --weight_decay 0.1    | SpectralAGD needs no weight decay
main --optimizer adam --weight_decay -1         | '-1' is not a finite number from 0
main --optimizer rprop --weight_decay 0 --cpu   | torch.optim.Rprop has no weight decay
main --schedule cosine                          | AGD finds the rate of each step
main --optimizer adam --schedule step           | no 'step' among constant, cosine
main --optimizer adam --schedule CosineDecay    | did you mean cosine
main --optimizer adam --warmup 1.5              | '1.5' is not a whole number
{DIGITS} --optimizer adam --schedule cosine --warmup 9999 | train longer or warm up less
main --cpu --device cuda                        | --cpu contradicts
main --device cuda:99                           | cuda:99
main --device gpu                               | did you mean cuda?
main --device GPU:1                             | did you mean cuda:1?
main --device cuda0                             | did you mean cuda:0?
main --device 0                                 | did you mean cuda:0?
main --device 0,1                               | --distribute takes several
main --device foo                               | torch has cpu, cuda, mps, xpu
main --device cdua                              | did you mean cuda?
main --device meta                              | its tensors hold no numbers
main --image_size 64                            | folder:PATH
main --augment flip                             | default, crop, none
main --augment off                              | did you mean none
{DIGITS} --augment crop                         | digits is not augmented
main --dataset mnist --augment none             | mnist is not augmented
main --cpu --cuda_graph on                      | it takes a CUDA device
main --cuda_graph yes                           | did you mean on
main --dataset folder:/x --train_examples 9     | prepared sets
main --save_every 0                             | neither a number of steps
main --save_every 1e400h                        | neither a number of steps
main --distribute --dataset digits              | torchrun
{DIGITS} --depth 3 --width 1000000              | its weights are 4.0 TB
main --dataset shakespeare --arch gpt {SMALL} --heads 3 | 3 heads do not divide a width of 4
main --dataset imagenet --data_dir {{tmp}}/none | no
{DIGITS} --out {{tmp}}/{"x" * 256}              | choose --out
{DIGITS} --out ~nobody_here/x                   | no user 'nobody_here'
{DIGITS} --out ''                               | '' is no path
{FOLDER}                                        | there is no folder
{NPZ}                                           | there is no
main --replay {{tmp}}/no.json                   | no.json
main --evaluate no --out {{tmp}}                | there is no run no in TMP/logs, nor any other
main --evaluate {{tmp}}/no/x.pt                 | there is no run x in TMP/no, nor any other
main --evaluate {{tmp}}                         | TMP holds no logs, nor does its logs/
main --evaluate x --seed 3                      | a run's flags from its log: leave out --seed
main --evaluate x --replay x                    | from its record: leave out --evaluate
plot                                            | required: RUN
plot {{tmp}}                                    | holds no logs, nor does its logs/
plot {{tmp}}/a.run.json                         | a.run.json is not beside it
plot {{tmp}}/checkpoints/a.pt                   | logs/a.jsonl
plot {{tmp}}/checkpoints/a.best.pt              | logs/a.jsonl
watch {{tmp}}/no                                | there is no folder
watch {{tmp}} --html {{tmp}}/x.html             | there is no log of a run
watch {{tmp}} --html x --port 1                 | is for a page that is served
watch --port 65536                              | from 0 to 65535
prepare                                         | required
prepare cifar11                                 | did you mean cifar10
prepare CIFAR-100                               | did you mean cifar100
prepare cifar10 --output x                      | there is no flag --output
prepare imagenet --num_workers 4                | did you mean --jobs
prepare text                                    | --from FILE_OR_FOLDER
prepare text --from {{tmp}}/no                  | there is no file or folder
prepare text --from x --tokenizer gpt2          | did you mean --encoding
prepare text --from x --encoding gpt-2          | did you mean gpt2
prepare imagenet --data_dir {{tmp}} --from {{tmp}}/no       | there is no folder
reproduce fig1 --runs 99999 --out {{tmp}}       | the list has the numbers
reproduce 9                                     | no 'fig9' among fig1, fig2
reproduce figure                                | fig lacks its number
reproduce --figure 5                            | a figure stands alone
reproduce fig1 --device gpu                     | did you mean cuda?
benchmark step --device gpu                     | no device 'gpu'
benchmark steps                                 | did you mean step?
spectral fnc                                    | did you mean fcn
experiments half                                | half
"""
FLAGS = [[x.strip() for x in line.split("|")] for line in FLAGS.strip().splitlines()]
FLAGS += [(f"{name} nonsense --nonsense", "nonsense") for name in PROGRAMS]


# A flag, and runs in which it has no effect.
FOLDERS, LISTS = "image_size 64|workers 7|skip_bad_images", "jobs 2|together on|fresh|runs 0"
IDLE = {
    "main --dataset digits": FOLDERS,
    "main": f"{FOLDERS}|sync_bn|lr 1|freeze ,|channels_last on|weight_decay 0|warmup 0",
    "main --dataset npz:x.npz": FOLDERS, "main --arch resnet18": "depth 34|width 128|sync_bn",
    "main --arch vgg": "depth 10|width 256",  # also where they are the defaults
    "main --arch torchvision:resnet18": "depth 3|width 3|bias|affine", "main --cpu": "affine",
    "main --dataset folder:x": "train_examples 9|test_examples 9",
    "main --arch gpt --dataset shakespeare":
        f"{FOLDERS}|train_examples 9|augment none|vocab 9|channels_last on|sync_bn",
    "main --arch vgg --dataset digits": "context 9|heads 2|dropout 0.1|tied|epoch_steps 9|vocab 9",
    "main --optimizer adam": "gain 1|gain 2|layers count|warmup 5",
    "main --optimizer spectral": "lr 0.1|schedule cosine",
    "main --optimizer torch.optim.SGD": "gain 1|layers paths",
    "prepare cifar10": "jobs 2|shard 1/2|resize|val_labels x|encoding bytes",
    "prepare imagenet": "encoding gpt2", "prepare text --from x": "shard 1/2|resize|val_labels x",
    "reproduce fig5 --list": f"{LISTS}|draw|time_limit 9m|submit slurm",
    "reproduce fig5 --draw": LISTS, "reproduce fig5 --submit slurm": "together on|fresh|runs 0",
    "reproduce fig5": "sbatch=--gres=gpu:1", "gpu_checks --only step": "plan first",
    "benchmark step": "arch fcn|folder x|image_size 64|depth 3|counts 2|batch_size 8",
    "benchmark epoch --arch vgg": "depth 3|nets 2|together on",
    "benchmark draw": "quick|repeats 2|dataset cifar10", "any_model report": "quick|only x|list",
    "spectral fcn --list": "only x",
}
IDLE = [(f"{run} --{flag}", f"--{flag.split()[0].split('=')[0]} ")
        for run, flags in IDLE.items() for flag in flags.split("|")]  # fmt: skip


@pytest.mark.parametrize(("command", "noun"), table(*IDLE))
def test_a_flag_without_effect_is_refused(command, noun, check):
    check(command, noun)


def test_the_commands_of_the_house_have_no_flag_without_effect():
    rows = {row.flags for scale in SCALES for row in experiments(scale)}
    for row in rows:
        flags.read(row, check=False)
    for words in (WORDS["cpu"], WORDS["cuda"]):
        for check in ALL.values():
            kind, *more = shlex.split(check.command.format(
                device="cpu", folder="x", data="d", limit=99, how="on", **words))  # fmt: skip
            if kind == "main.py":
                flags.read(more, check=False)
            elif more[0] == "scripts.benchmark":
                benchmark.parse(more[1:])
            elif more[0] == "scripts.reproduce":
                reproduce.parse(more[1:])


def test_what_a_built_network_has_no_use_for():
    args = flags.parse(["--cpu", "--distribute", "--sync_bn", "--arch", "vgg"], check=False)
    with pytest.raises(Unfit, match="--sync_bn is for networks with batch norm, and vgg has none"):
        flags.check_network(args, nn.Conv2d(1, 1, 1))
    flags.check_network(args, nn.BatchNorm1d(1))
    args = flags.parse(["--cpu", "--arch", "timm:x", "--channels_last", "on"], check=False)
    with pytest.raises(Unfit, match="--channels_last on is for convolutions, and timm:x has none"):
        flags.check_network(args, nn.Linear(1, 1))
    flags.check_network(args, nn.Conv2d(1, 1, 1))


def test_a_rate_for_a_class_without_one(check, monkeypatch):
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self):
            pass

    monkeypatch.setattr(torch.optim, "Own", Own, raising=False)
    check(f"{DIGITS} --optimizer torch.optim.Own --lr 1", "--lr: torch.optim.Own has no")
    check(f"{DIGITS} --optimizer torch.optim.Own --schedule cosine", "--schedule: torch.optim.Own")
    check(f"{DIGITS} --optimizer torch.optim.Own", "", 0)


def test_flags_without_effect_of_earlier_commits_stay_in_their_records(
    check, tmp_path, monkeypatch
):
    """They replay to the bit, log included; their command is one that can be given."""
    idle = f"{DIGITS} --skip_bad_images --workers 7"
    with monkeypatch.context() as patch:
        patch.setattr(flags, "without_effect", lambda args: {})
        check(idle, "", 0)
    record = first(tmp_path / "out", "*.run.json")
    check(f"main --replay {record} --cpu --out {{tmp}}/again", "", 0)
    again = json.loads(first(tmp_path / "again", "*.run.json").read_text())
    assert again["flags"]["skip_bad_images"] and not any("bad" in x for x in again["command"])
    check(idle, "--workers is for imagenet")


@pytest.mark.parametrize("words", [
    *(f"main.py {x}" for x in (
        "--typo", "--help", "--batch_size 3", "digits", "--arch resnet18 --depth 34",
        "--device gpu", "--dataset CIFAR-10", "--weights no.pt", "--lr 1", "--out ~nobody_here/x")),
    "scripts/reproduce.py figure5.png", "scripts/plot.py x -o x.gif",
    "scripts/benchmark/__main__.py steps", "scripts/watch/__main__.py no_such_folder",
])  # fmt: skip
def test_a_refusal_does_not_wait_for_torch(words):
    """Its import takes a second or more."""
    file, *words = words.split()
    code = (f"import runpy, sys\ntry: runpy.run_path({file!r}, run_name='__main__')\n"
            "except SystemExit as end: code = end.code or 0\n"
            "slow = {'torch', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
            "sys.exit(77 if slow else code)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True)
    assert done.returncode == (0 if words == ["--help"] else 2), done.stderr


@pytest.mark.parametrize("text", ["1e3", "1000.0", "+1000"])
def test_a_whole_number_as_people_write_it(text):
    epochs = flags.read(["--epochs", text])[1].epochs
    assert epochs == 1000 and type(epochs) is int


@pytest.mark.parametrize(("text", "figure"), [
    ("figure5", "fig5"), ("5", "fig5"), ("fig.5", "fig5"), ("Fig5", "fig5"), ("figure 5", "fig5"),
    ("Figure-08", "fig8"), ("10", "fig10"), ("11", "fig11"), ("all", "all"),
    ("phases", "phases"),
])  # fmt: skip
def test_a_figure_is_taken_as_people_write_it(text, figure):
    assert reproduce.figure(text) == figure


def test_a_figure_in_two_words_is_one():
    assert reproduce.parse(["figure", "5", "Fig", "8", "--list"])[1].figures == ["fig5", "fig8"]


def test_every_path_has_its_home(check, tmp_path, monkeypatch):
    """~ in each flag of each command that is a path, and in what stands for one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    npz(text("home/x")(tmp_path) or tmp_path / "home")
    check(f"{NPZ} --data_dir ~ --out ~/out".replace(" --data_dir {tmp}", ""), "", 0)
    check(f"main --dataset npz:~/set.npz {SMALL} --out ~/out", "", 0)
    weights = "~/out/checkpoints/" + first(tmp_path / "home/out", "*.pt").name
    check(f"{NPZ} --weights {weights} --out ~/more --data_dir ~", "", 0)
    check(f"main --replay ~/out/logs/{first(tmp_path / 'home/out', '*.json').name} --cpu", "", 0)
    images()(tmp_path / "home")
    check(f"main --dataset folder:~/images {SMALL} --image_size 32 --workers 0", "", 0)
    check(f"plot ~/out/logs/{first(tmp_path / 'home/out', '*.jsonl').name} -o ~/x.png", "", 0)
    check("watch ~/out --html ~/x.html", "", 0)
    assert (tmp_path / "home/x.png").exists() and (tmp_path / "home/x.html").exists()
    check("prepare cifar10 --data_dir ~/sets --from ~/set.npz", "damaged or another")
    check("prepare imagenet --data_dir ~/sets --from ~/images", "2 class folders")
    monkeypatch.setenv("AGD_DATA", "~/set")
    check(f"main --dataset npz:x.npz {SMALL}", "home/set/x.npz")
    for name in ("reproduce fig1 --draw", "spectral report"):
        assert run(f"{name} --out ~/{name.split()[0]}", tmp_path) in (0, 1)
    assert not (tmp_path / "~").exists() and (tmp_path / "home/sets").is_dir()


@pytest.mark.parametrize(("command", "noun"), table(
    ("main --dataset cifar10", "give the whole path, or set $AGD_DATA"),
    ("main --dataset imagenet", "give the whole path, or set $AGD_DATA"),
    ("main --dataset npz:x.npz", "give the whole path, or set $AGD_DATA"),
    ("main --dataset npz:~/x.npz", "--dataset: there is no home directory for ~/x.npz"),
    ("main --dataset folder:~/x", "--dataset: there is no home directory for ~/x"),
    *((f"{DIGITS} --{flag} ~/x.pt", f"argument --{flag}: there is no home directory for ~/x.pt")
      for flag in ("out", "weights", "replay", "evaluate")),
    ("prepare cifar10", "give the whole path, or set $AGD_DATA"),
    ("prepare cifar10 --data_dir {tmp} --from ~/x", "argument --from"),
    ("prepare imagenet --from x --val_labels ~/x", "argument --val_labels"),
    ("prepare text --from ~/x", "argument --from"),
    ("plot ~/x", "argument RUN"), ("plot x -o ~/x.png", "argument -o/--output"),
    ("watch ~/x", "argument FOLDER"), ("watch x --html ~/x.html", "argument --html"),
    ("reproduce fig5 --list --out {tmp}", "$AGD_DATA"), ("reproduce 5 --out ~/x", "argument --out"),
    ("benchmark data --folder ~/x", "argument --folder"),
    ("benchmark draw --out ~/x", "argument --out"),
    ("spectral fcn --quick --out {tmp}", "$AGD_DATA"), ("any_model report --out ~", "--out"),
    ("gpu_checks --device cpu --work ~", "argument --work"),
    ("gpu_checks --device cpu --out ~", "argument --out"),
))  # fmt: skip
def test_no_home_directory(command, noun, check, monkeypatch):
    """As in a container that is run as an account of no name."""
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("AGD_DATA", raising=False)
    check(command, noun)


@pytest.mark.parametrize("command", ["main --dataset imagenet", "prepare imagenet"])
def test_no_home_directory_for_imagenet(command, check, monkeypatch):
    monkeypatch.setenv("IMAGENET_PATH", "~nobody_here/x")
    check(f"{command} --data_dir {{tmp}}", "$IMAGENET_PATH: there is no user 'nobody_here'")


@pytest.mark.parametrize(("command", "noun"), table(*FLAGS))
def test_bad_flags(command, noun, check):
    check(command, noun)


def test_batches_of_exabytes_are_no_fault(check):
    check(f"{DIGITS} --train_bs {2**62} --test_bs {2**62}", "", 0)


# Files and folders: what is laid there, f(tmp).


def text(name, content=b"some text\n"):
    def write(tmp):
        path = tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write


def images(*names, content=b"no image"):
    """Images of two classes, then files of `content` with these names in train/."""
    def write(tmp):
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                folder = tmp / "images" / split / name
                folder.mkdir(parents=True)
                Image.new("RGB", (40, 40), (90, 80, 70)).save(folder / "0.jpg")
        for name in names:
            text(f"images/train/{name}", content)(tmp)

    return write


def tokens(meta, train=bytes(200), val=bytes(200)):
    """A folder of tokens, with a meta.json of an object or of bytes; None: without the file."""
    def write(tmp):
        meta_json = meta if isinstance(meta, (bytes, type(None))) else json.dumps(meta).encode()
        for name, content in (("train.bin", train), ("val.bin", val), ("meta.json", meta_json)):
            if content is not None:
                text(f"t/{name}", content)(tmp)

    return write


def pixels(mode):
    """Images of two classes, and one of PIL's `mode`."""
    def write(tmp):
        images()(tmp)
        Image.new(mode, (40, 40)).save(tmp / "images/train/cat/x.jpg", "TIFF")

    return write


def npz(tmp, **arrays):
    """set.npz as it should be, with these arrays in it."""
    for split in ("train", "test"):
        arrays.setdefault(f"{split}_images", np.zeros((8, 8, 8, 1), np.uint8))
        arrays.setdefault(f"{split}_labels", np.arange(8) % 2)
    np.savez(tmp / "set.npz", **arrays)


FIRST = b'{"kind": "run", "flags": {}, "settings": {}}\n'
PREPARE = "prepare cifar10 --data_dir {tmp}"
PLACES = table(
    ("main --dataset cifar10 --data_dir {tmp}/file", "cifar10", text("file")),
    (f"{DIGITS} --out {{tmp}}/file", "choose --out", text("file")),
    (f"{DIGITS} --out {{tmp}}/file/x", "choose --out", text("file")),
    (DIGITS, "choose --out", text("out/logs")),
    (f"{DIGITS} --profile", "--profile", text("out/profiles")),
    (FOLDER, "there is no folder", text("images")),
    (FOLDER, "ant", images("ant/notes.txt")),
    (FOLDER, "ant; the files there are .svg (2), .heic (1), and images are .jpg",
     images("ant/1.svg", "ant/2.svg", "ant/1.HEIC")),
    (FOLDER, "x.jpg cannot be decoded: its pixels are floats", pixels("F")),
    (FOLDER, "x.jpg cannot be decoded: its pixels are integers", pixels("I")),
    (FOLDER, "cow", lambda tmp: [images()(tmp), text("images/val/cow/0.jpg")(tmp)]),
    (FOLDER, "x.jpg cannot be decoded", images("cat/x.jpg")),
    (f"{FOLDER} --skip_bad_images", "none of the 2 images", images("cat/0.jpg", "dog/0.jpg")),
    (NPZ, "set.npz is damaged", text("set.npz")),
    (NPZ, "train_labels", lambda tmp: npz(tmp, train_labels=np.array([{}] * 8, object))),
    (f"{NPZ} --augment crop", "npz:set.npz is not augmented", npz),
    (f"{NPZ} --augment crop", "npz:set.npz is not augmented",
     lambda tmp: npz(tmp, **{f"{x}_images": np.zeros((8, 4, 4, 3), np.uint8)
                             for x in ("train", "test")})),
    *((NPZ, noun, lambda tmp, key=key, x=x: npz(tmp, **{key: x})) for noun, key, x in (
        ("train_labels is float64 (8) with values that are not whole", "train_labels",
         np.full(8, np.nan)),
        ("train_labels run from -1 to 0", "train_labels", np.arange(8) % 2 - 1),
        ("test_labels run from 0 to 2", "test_labels", np.arange(8) % 3),
        ("test_labels is int64 (8, 2), not a number", "test_labels", np.ones((8, 2), int)),
        ("train_images is float32 (8, 8, 8, 1), not uint8", "train_images",
         np.zeros((8, 8, 8, 1), np.float32)))),
    (TEXT, "a.txt is empty", text("a.txt", b"")),
    (TEXT, "the validation part of TMP/a.txt has 5 tokens, and a window takes 9: give a smaller",
     text("a.txt", b"x" * 50)),
    (TEXT, "the training part of TMP/a.txt has 7 tokens", text("a.txt", b"x" * 8)),
    *((TEXT, f"a.txt is not UTF-8 at byte {at:,}", text("a.txt", content)) for at, content in (
        (3, b"abc\xff" + b"d" * 99), (0, "text".encode("utf-16")),
        (2**20 - 1, b"x" * (2**20 - 1) + "é".encode()[:1] + b"x" * 99),
        (2**20 - 2, b"x" * (2**20 - 2) + "€".encode()[:2]),
        (300, b"x" * 300 + "€".encode()[:2]))),
    (TEXT, "val.txt is empty", lambda tmp: [text(f"a.txt/{x}.txt", c)(tmp) for x, c in (
        ("train", b"x" * 99), ("val", b""))]),
    (TEXT, "a folder without train.txt and val.txt", text("a.txt/train.txt")),
    (TOKENS, "t is a file, and no folder of train.bin and val.bin: --dataset text:", text("t")),
    (TEXT, "a.txt has token ids: --dataset tokens:", text("a.txt/train.bin")),
    (TOKENS, "train.bin looks like uint32, as every other number is 0",
     tokens({"vocab_size": 9}, train=b"\5\0\0\0" * 1000)),
    (TOKENS, "t has no meta.json with its vocab_size: give --vocab N", tokens(None)),
    (TOKENS, "there is no file TMP/t/val.bin", tokens({"vocab_size": 9}, val=None)),
    (TOKENS, "train.bin is empty", tokens({"vocab_size": 9}, train=b"")),
    (TOKENS, "train.bin has 199 bytes, and a token of uint16 takes 2", tokens({"vocab_size": 9},
     train=bytes(199))),
    (TOKENS, "val.bin has 202 bytes, and a token of uint32 takes 4",
     tokens({"vocab_size": 9, "dtype": "uint32"}, val=bytes(202))),
    (TOKENS, "val.bin has 8 tokens, and a window takes 9", tokens({"vocab_size": 9},
     val=bytes(16))),
    (TOKENS, "train.bin has the token 257, and a vocabulary of 9 has those from 0 to 8: give",
     tokens({"vocab_size": 9}, train=b"\1" * 200)),
    (f"{TOKENS} --vocab 5", "val.bin has the token 5, and a vocabulary of 5",
     tokens({"vocab_size": 9}, val=b"\5\0" * 100)),
    *((TOKENS, f"meta.json cannot be used: {noun}", tokens(meta)) for noun, meta in (
        ("", b"{"), ("", b"\xff"), ("", b"[" * 100_000), ("it is no object", b"[]"),
        ("its vocab_size is no number", {"vocab_size": "9"}),
        ("its vocab_size is no number", {"vocab_size": True}),
        ("its vocab_size is no number", {"vocab_size": 1}),
        ("its vocab_size is no number", {"vocab_size": 2**31}),
        ("its dtype is none of uint16, uint32", {"vocab_size": 9, "dtype": "int64"}),
        ("its dtype is none of uint16, uint32", {"vocab_size": 9, "dtype": ["uint16"]}),
        ("its encoding is no object", {"vocab_size": 9, "encoding": "gpt2"}),
        ("its encoding is no object", {"vocab_size": 9, "encoding": {"kind": 3}}),
        ("its train has no counts", {"vocab_size": 9, "train": 3}),
        ("its val has no counts", {"vocab_size": 9, "val": {"bytes": -1}}),
        ("its val has no counts", {"vocab_size": 9, "val": {"tokens": 10**400}}))),
    (REPLAY, "x.json", text("x.json")),
    (PLOT, "no finished epoch", text("x.jsonl", FIRST)),
    (PLOT, "line 2 has no", text("x.jsonl", FIRST + b'{"kind": "epoch", "epoch": 1}\n')),
    (f"{PREPARE} --from {{tmp}}/x.tar.gz", "is not the whole", text("x.tar.gz")),
    (f"{PREPARE}/file --from {{tmp}}/file", "in TMP/file: File exists; give", text("file")),
    (f"{PREPARE} --from {{tmp}}/set.npz", "damaged or another", npz),
    (f"{PREPARE}/file --from {{tmp}}/set.npz", "could not be prepared",
     lambda tmp: [npz(tmp), text("file")(tmp)]),
    ("prepare imagenet --data_dir {tmp} --from {tmp}/images", "2 class folders", images()),
    *((f"prepare text --encoding bytes --data_dir {{tmp}}/{where} --from {{tmp}}/{name}", noun,
       lambda tmp, name=name, content=content: [text("file")(tmp), text(name, content)(tmp)])
      for where, name, content, noun in (
          ("out", "x.txt", b"", "x.txt is empty"),
          ("out", "x.txt", b"caf\xe9", "x.txt is not UTF-8 at byte 3"),
          ("out", "x.jsonl", b"{}\n", "x.jsonl has a line at byte 0"),
          ("out", "x.txt.gz", b"some text", "x.txt.gz cannot be read"),
          ("out", "x.txt", b"a", "too little text"),
          ("file", "x.txt", b"some text",
           "x-bytes cannot be written: Not a directory; give another --data_dir"))),
    ("prepare text --encoding bytes --data_dir {tmp}/out --from {tmp}/images/train",
     "holds no text: that is .txt or .jsonl, or either packed as .gz, .bz2 or .xz, and the files "
     "there are .jpg (2)", images()),
    ("reproduce fig1 --out {tmp}/file", "is a file", text("file")),
    ("reproduce fig1 --runs 0 --out {tmp}/file/x", "file/x", text("file")),
)  # fmt: skip


@pytest.mark.parametrize(("command", "noun", "prepare"), PLACES)
def test_bad_files_and_folders(command, noun, prepare, check, tmp_path):
    prepare(tmp_path)
    check(command, noun)


@posix
def test_links_forbidden_folders_and_odd_names(check, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    check(f"{DIGITS} --out {{tmp}}/link", "choose --out")
    if os.geteuid():  # nothing is forbidden to root
        (tmp_path / "shut").mkdir(0o500)
        check(f"{DIGITS} --out {{tmp}}/shut/out", "choose --out")
        text("a.txt")(tmp_path)
        (tmp_path / "a.txt").chmod(0)
        check(TEXT, "a.txt cannot be read: Permission denied")
        tokens({"vocab_size": 9})(tmp_path)
        (tmp_path / "t/meta.json").chmod(0)
        check(TOKENS, "meta.json cannot be read: Permission denied")
    if sys.platform == "linux":  # file names are UTF-8 elsewhere
        images(os.fsdecode(b"cat/\xff\xfe.jpg"))(tmp_path)
        check(FOLDER, "\\udcff\\udcfe.jpg cannot be decoded")


@posix
@pytest.mark.parametrize("name, command, noun", [
    ("a.txt", TEXT, "a.txt is no file"), ("t/train.bin", TOKENS, "train.bin is no file"),
    ("t/val.bin", TOKENS, "val.bin is no file"), ("t/meta.json", TOKENS, "it is no small file"),
])  # fmt: skip
def test_a_pipe_for_a_text(name, command, noun, check, tmp_path):
    tokens({"vocab_size": 9})(tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    check(command, noun)


# Files of an earlier run: `change` gets the content, or the path of the file.


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """The folder of a run of two epochs."""
    tmp = tmp_path_factory.mktemp("ran")
    assert run(f"{DIGITS} --epochs 2", tmp) == 0
    return tmp / "out"


@pytest.fixture
def out(ran, tmp_path):
    return shutil.copytree(ran, tmp_path / "out")


def first(out, pattern):
    return next(out.rglob(pattern))


def checkpoints(out, change):
    """Replace the content of both checkpoints by change(content)."""
    for path in (out / "checkpoints").glob("*.pt*"):
        path.write_bytes(pack(change(unpack(path.read_bytes()))))


CHECKPOINTS = table(
    (lambda x: x["net"], "no checkpoint"),
    (lambda x: [1, 2], "no checkpoint"),
    *(({key: value}, "no checkpoint") for key, value in (
        ("epoch", -1), ("epoch", True), ("epoch", 10**18), ("step", "3"), ("settings", "{"),
        ("settings", "[1]"))),
    ({"epoch": 7}, "lacks epochs"),
    ({"step": 9}, "step 9 of 2"),
    ({"step": 1}, "step 1 and no totals"),
    *(({key: value}, "another network or optimiser") for key, value in (
        ("optimizer", {}), ("net", 3), ("seconds", "many"), ("seconds", float("nan")),
        ("micro_bs", "x"), ("micro_bs", [None, 0]), ("missing", 1e400), ("generators", "x"),
        ("not_finite", ["ab"]), ("totals", {}), ("bad_images", "["))),
)  # fmt: skip


@pytest.mark.parametrize(("change", "noun"), CHECKPOINTS)
def test_bad_checkpoints(change, noun, check, out):
    checkpoints(out, change if callable(change) else lambda content: content | change)
    check(ON, noun)


def evaluated(tmp):
    return f"main --evaluate {tmp}/out --cpu"


@pytest.mark.parametrize(("change", "noun"), table(
    (lambda x: x["net"], "is no checkpoint of a run"),
    ({"step": "3"}, "is no checkpoint of a run"),
    ({"micro_bs": "x"}, "its micro_bs cannot be used"),
    ({"net": {}}, "does not fit the network of TMP/out/logs/fcn2x4-digits"),
    ({"net": 3}, "does not fit the network"),
    ({"settings": '{"seed": 3}'}, "is of another run than TMP/out/logs"),
))  # fmt: skip
def test_bad_checkpoints_of_an_evaluation(change, noun, check, out, tmp_path):
    checkpoints(out, change if callable(change) else lambda content: content | change)
    check(evaluated(tmp_path), noun)


def test_files_that_an_evaluation_lacks(check, out, tmp_path):
    log, (path, before) = first(out, "*.jsonl"), sorted((out / "checkpoints").glob("*.pt*"))
    near = f"{log.stem[:-1]}1"
    check(f"main --evaluate {near} --out {{tmp}}/out", f"did you mean {log.stem}?")
    check("main --evaluate zzz --out {tmp}/out", f"zzz in TMP/out/logs, which has {log.stem}")
    check("main --evaluate {tmp}/out/checkpoints/" + f"{log.stem}.best.pt", "with --keep_best")
    check(f"main --evaluate {log.stem}.best.pt --out {{tmp}}/out", "with --keep_best")
    lock = next((out / "checkpoints").glob("*.lock"))
    check(f"main --evaluate {lock}", "is no file of a run: those are NAME.jsonl")
    check(f"{evaluated(tmp_path)} --dataset digits", "", 0)
    check(f"{evaluated(tmp_path)} --dataset mnist", "leave out --dataset")
    shutil.copy(log, log.with_name("b.jsonl"))
    check(evaluated(tmp_path), f"TMP/out has 2 runs: b, {log.stem}; name one")
    log.with_name("b.jsonl").unlink()
    path.write_bytes(path.read_bytes()[:-100])
    check(evaluated(tmp_path), ".pt.previous is the one before")
    check(f"main --evaluate {before} --cpu", "", 0)
    path.unlink(), before.unlink()
    check(evaluated(tmp_path), "there is no TMP/out/checkpoints/fcn2x4-digits")
    path.write_bytes(b"")
    for then in (b"{}", b'{"arch": [1]}'):
        log.write_bytes(FIRST.replace(b"{}", then, 1))
        check(evaluated(tmp_path), "its flags have no arch that can be used")
    log.rename(tmp_path / "log")
    check(f"main --evaluate {path}", "there is no log TMP/out/logs/fcn2x4-digits")


class Canary:
    """Its pickle writes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_checkpoints_that_are_cut_or_programs(check, out, tmp_path):
    paths, canary = list((out / "checkpoints").glob("*.pt*")), Canary(f"{tmp_path}/canary")
    for path in paths:
        path.write_bytes(path.read_bytes()[:-100])
    check(ON, "--fresh")
    for path, data in zip(paths, (pack({"epoch": 1, "net": canary}), pickle.dumps(canary))):
        path.write_bytes(data)
    check(ON, "--fresh")


def test_a_checkpoint_of_another_network(check, out, tmp_path):
    """The settings are made to agree: what is left to differ is the network itself."""
    assert run(f"{DIGITS} --width 5 --out {{tmp}}/wide", tmp_path) == 0
    wide = unpack(first(tmp_path / "wide", "*.pt").read_bytes())
    checkpoints(out, lambda content: wide | {"settings": content["settings"]})
    check(ON, "another network")


@pytest.mark.parametrize("pattern, code", [("*.pt", 0), ("*.jsonl", 2)])
@pytest.mark.parametrize("put", [pytest.param(os.mkfifo, marks=posix), os.mkdir])
def test_a_pipe_or_a_folder_for_a_file(put, pattern, code, check, out):
    """A checkpoint that cannot be read is set aside for the one before."""
    path = first(out, pattern)
    path.unlink()
    put(path)
    check(ON, "no log of a run", code)


def at(i, old, new):
    """The lines of a log, with a word of line `i` replaced."""
    return lambda x: [*x[:i], x[i].replace(old.encode(), new.encode()), *x[i + 1 :]]


def row(**changes):
    """The lines of a log, in which the row of the first epoch is changed."""
    return lambda x: [x[0], json.dumps(json.loads(x[1]) | changes).encode() + b"\n", *x[2:]]


LOGS = table(
    (lambda x: [bytes(range(256)) * 9], "--fresh"),
    *((lambda x, line=line: [line, *x[1:]], "no log of a run") for line in (
        b'{"level": "info"}\n', b"1\n2\n", b"[" * 100_000 + b"\n", b"")),
    (at(0, '"settings"', '"x"'), "line 1 has no settings; another --out keeps it, --fresh"),
    (at(0, '"flags"', '"x"'), "line 1 has no flags; another --out keeps it, --fresh"),
    (at(0, '"kind"', '"x"'), "line 1 has no kind; another --out keeps it"),
    (at(0, '"kind": "run"', '"kind": "ran"'), "line 1 has 'ran' for kind, not \"run\"; another"),
    (at(0, '"settings": {', '"settings": 3, "x": {'), "line 1 has 3 for settings; another --out"),
    (at(0, '"kind": "run"', '"kind": "run", "image_files": 3'), "3 for image_files; another --out"),
    (at(0, ", ", ",, "), "line 1: "),
    (lambda x: [x[0], x[1][:20] + b"\n", *x[2:]], "line 2"),
    (at(1, '"seconds"', '"x"'), "line 2 has no seconds"),
    (lambda x: [x[0], *x[2:]], "lacks epochs"),
    (at(0, '"seed": 0', '"seed": 7'), "seed 7 then, 0 now); another --out keeps it, --fresh"),
    (at(0, '"seed": 0', '"x": 0'), "seed None then, 0 now"),
    (at(3, '"stopped": null', '"stopped": []'), "for stopped"),
    *((row(**{key: value}), f"for {key}") for key, value in (
        ("epoch", None), ("epoch", 0), ("train_loss", "small"), ("test_acc", None),
        ("eta_min", {}))),
    (row(kind=3), "line 2 has 3 for kind"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "noun"), LOGS)
def test_bad_logs(change, noun, check, out):
    path = first(out, "*.jsonl")
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    check(ON, noun)


def test_a_log_whose_last_line_is_torn_is_no_fault(check, out):
    path = first(out, "*.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    check(ON, "", 0)


def test_a_log_or_a_record_in_another_place(check, ran, tmp_path):
    rows, record = first(ran, "*.jsonl").read_bytes(), first(ran, "*.run.json").read_text()
    for content, more, noun in (
        (rows.decode(), "", "x.json"), (record, "--epochs 3", "--epochs"),
        (record.replace('"depth": 2', '"depth": "two"'), "", "argument --depth: 'two'"),
    ):  # fmt: skip
        (tmp_path / "x.json").write_text(content)
        check(f"{REPLAY} {more}", noun)
    (tmp_path / "x.jsonl").write_bytes(rows)
    check(f"{PLOT} -o {{tmp}}/no/x.png", "x.png")


@pytest.mark.parametrize("words", [("main.py", "digits"), ("-m", "scripts.experiments", "half")])
def test_a_process_ends_with_that_code(words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
