"""What every command line shares: a parser that suggests what was meant, types of arguments, and
errors whose message is all that a user needs."""

import argparse
import contextlib
import difflib
import math
import os
import re
import shlex
import signal
import sys
from pathlib import Path

TIME_IS_UP = 75  # an exit code, EX_TEMPFAIL: the same command goes on


class UserError(RuntimeError):
    """An error whose message says what is wrong and what to do about it: printed as one line, with
    no traceback. `exit_code` is the process's: 2 for input that cannot be used, else 1."""

    exit_code = 2

    def __init__(self, message):
        super().__init__(printable(message))


class Guarded:
    """A text stream that drops what it cannot write: its reader is gone, its disk is full, its
    terminal has closed. It tries again with the next text."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def writelines(self, texts):
        for text in texts:
            self.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def isatty(self):
        with contextlib.suppress(OSError, ValueError):
            return self.stream.isatty()
        return False

    def __getattr__(self, name):
        return getattr(self.stream, name)


def guard_streams():
    """Make sure that no failed print ends this process, nor changes its exit code: standard output
    and error are Guarded from here on, and open. They print any character, and whole lines at once.

    What C libraries print must not get into a file that was opened under the number of a closed
    stream: the three numbers are taken by os.devnull where they are free.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Guarded):
            continue
        if stream is None:  # it was closed when the interpreter began
            stream = open(os.devnull, "w", encoding="utf-8")
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
        setattr(sys, name, Guarded(stream))


def printable(text):
    """`text` with each unprintable character as a backslash escape: control characters, and the
    bytes of a file name that is not UTF-8."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def interruptible():
    """Have SIGTERM, and SIGHUP as a terminal closes, raise KeyboardInterrupt as Ctrl-C does. What
    the parent process ignores, as nohup has it, stays ignored."""
    numbers = {getattr(signal, name, None) for name in ("SIGINT", "SIGHUP")} - {None}
    for number in {signal.SIGTERM, *(x for x in numbers if signal.getsignal(x) != signal.SIG_IGN)}:
        signal.signal(number, signal.default_int_handler)


def command(name, *words):
    """The command that starts `name`, "main" or a module as "scripts.plot", with these arguments,
    from the working directory: `python -m` works in the root of the repository alone."""
    root = Path(__file__).resolve().parent
    path = root.joinpath(*name.split("."))
    path = path if path.is_dir() else path.with_suffix(".py")
    with contextlib.suppress(OSError):  # the working directory may be gone
        if os.path.samefile(os.getcwd(), root):
            path = path.relative_to(root)
    line = ["-m", name] if "." in name and not path.is_absolute() else [path]
    return shlex.join(map(str, ["python", *line, *words]))


def size(n):
    """Bytes in words."""
    power = next((k for k in range(4) if n < 1000 ** (k + 1)), 4)
    n, unit = n / 1000**power, ("B", "kB", "MB", "GB", "TB")[power]
    return f"{n:.0f} {unit}" if n >= 10 or unit == "B" else f"{n:.1f} {unit}"


DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # as web pages and editors set them
LONGEST = 250  # characters of a message, whatever was given

# Words for the same flag, a flag's own first. A command suggests the one that it has itself.
SYNONYMS = """
arch model net network architecture backbone a m
check dry_run doctor
compile jit
cpu no_cuda no_gpu disable_cuda force_cpu
data_dir data_path data_root root dataset_dir dataset_path data_folder
dataset ds d
context block_size seq_len sequence_length context_length max_length ctx n_ctx n_positions
depth n_layers num_layers hidden_layers n_hidden_layers n_layer blocks n_blocks
device gpu cuda gpu_id gpu_ids use_cuda use_gpu accelerator
distribute ddp dist multi_gpu gpus n_gpus num_gpus n_gpu nproc nproc_per_node nodes num_nodes nnodes
distribute world_size local_rank rank parallel multiprocessing_distributed
encoding tokenizer tokeniser tokens bpe
dropout drop drop_rate resid_pdrop attn_pdrop embd_pdrop
epochs ep e n
fresh overwrite restart clean from_scratch scratch
freeze freeze_layers
heads n_head n_heads num_heads num_attention_heads
image_size img resolution res input_size crop_size side
keep_best save_best save_best_only best best_checkpoint keep_best_only load_best_model_at_end
log_steps log_interval log_freq log_every print_freq print_every
loss criterion loss_function objective
lr learning_rate rate base_lr init_lr initial_lr eta
micro_bs accumulate accum accum_steps accum_iter grad_accum gradient_accumulation
micro_bs gradient_accumulation_steps accumulate_grad_batches
optimizer opt algorithm algo
out output log_dir output_dir out_dir save_dir save_path save_to dir logs log_path log o results
out result_dir results_dir exp_dir work_dir checkpoint_dir ckpt_dir
precision amp fp16 bf16 bfloat16 tf32 half dtype use_amp autocast
replay record
save_every save_freq save_interval save_steps checkpoint_every checkpoint_interval checkpoint_freq
save_every ckpt_every
schedule scheduler lr_scheduler lr_schedule lr_scheduler_type sched
seed random_seed manual_seed s
skip_bad_images skip_corrupt skip_errors ignore_errors
sync_bn sync_batch_norm
test_bs eval_batch_size val_batch_size valid_batch_size eval_bs val_bs per_device_eval_batch_size
test_examples n_test num_test test_size limit_test
train_bs batch_size batch bs b minibatch_size minibatch bsz batch_sz per_device_train_batch_size
train_bs batch_per_gpu
train_examples n_train num_train train_size subset num_samples n_samples limit_train
train_examples limit_train_batches
warmup warmup_steps num_warmup_steps warmup_iters lr_warmup_steps
weight_decay wd l2 l2_reg decay
weights pretrained pretrained_weights pretrain finetune init_from state_dict
track tracker trackers tracking logger loggers report_to log_with
tied tie tie_weights weight_tying tie_word_embeddings
vocab vocab_size vocabulary n_vocab
width hidden hidden_size hidden_dim n_hidden hidden_units num_hidden n_embd d_model embed_dim
workers dataloader_num_workers threads
jobs num_jobs n_jobs processes num_procs parallel_jobs workers num_workers n_workers nw j
from source src input copy i
resize image_size
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests what was meant; `silent` where another rank prints it.
    Every command begins with one, which guards its streams."""

    silent = False
    absent = {}  # a flag that people look for -> what stands in its place

    def parse_args(self, args=None, namespace=None):
        guard_streams()
        words = sys.argv[1:] if args is None else args
        args, unknown = self.parse_known_args(words, namespace)
        if unknown:
            switches = [x for x, a in self._option_string_actions.items() if a.nargs == 0]
            before = [x for x, y in zip(words, words[1:]) if y == unknown[0] and x in switches]
            odd = on_or_off(unknown[0])
            if before and odd:
                flag = f"{before[0]} " if odd == "off" else ""
                self.error(f"{before[0]} takes no value: leave out {flag}{unknown[0]}")
            self.error(self.unknown(unknown[0]))
        return args

    def given(self, args=None):
        """{name: value} of what the command line gives, without defaults."""
        unset = object()
        names = dict.fromkeys((x.dest for x in self._actions if x.dest != "help"), unset)
        values = vars(self.parse_args(args, argparse.Namespace(**names)))
        return {name: x for name, x in values.items() if x is not unset}

    def refuse(self, args, idle):
        """Refuse a flag that the command line gives and that `idle`, {name: reason}, names: it
        would have no effect."""
        given = self.given(args)
        for action in self._actions:
            if action.dest in idle and action.dest in given:
                self.error(f"{action.option_strings[-1]} {idle[action.dest]}")

    def unknown(self, word):
        """The message for a word that no argument takes."""
        flag, stray = word.split("=")[0], not word.startswith(tuple(DASHES))
        message = f"there is no {f'place for {word}' if stray else f'flag {flag}'}"
        name, flags = _plain(flag), {_plain(x): x for x in self._option_string_actions}
        if name not in flags and name in self.absent:
            return f"{message}; {self.absent[name]}"
        if stray:
            return message + self._place(word)
        switch = flags.get(name[2:]) if name.startswith("no") else None
        action = self._option_string_actions.get(switch)
        if action and action.nargs == 0:
            return f"{message}: without {switch} it is off"
        if action and action.const == "on":
            return f"{message}; did you mean {switch} off?"
        lines = (list(map(_plain, line.split())) for line in SYNONYMS.splitlines())
        words = [name, *(word for line in lines if name in line for word in line)]
        meant = next((flags[x] for x in words if x in flags), None)
        if meant or len(words) > 1:  # what has a name elsewhere, and none here, is like no other
            return message + (f"; did you mean {meant}?" if meant else "")
        return message + near(flag, [x for x in flags.values() if x.startswith("--")])

    def _place(self, word):
        """The flag whose value a stray word may be."""
        if not re.search("[A-Za-z]", word):
            return ""
        for action in self._actions:
            meant = getattr(action.type, "meant", lambda value: None)(word)
            if meant is not None and action.option_strings:
                return f"; did you mean {action.option_strings[-1]} {meant}?"
        return near(word, self._option_string_actions) if word.isidentifier() else ""

    def error(self, message):
        message = re.sub("^argument (.*): ignored explicit.*", r"\1 takes no value", message)
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
        if self.silent:
            self.exit(2)
        self.exit(2, f"error: {message}\n       {self.prog} --help lists the flags\n")


def _plain(word):
    """A word without case, dashes and dots: CIFAR-10 as cifar10."""
    return re.sub(r"[\W_]+", "", word).lower()


def near(word, words):
    """A suggestion, or nothing."""
    plain = {_plain(x): x for x in words}
    close = difflib.get_close_matches(_plain(word), plain, n=1, cutoff=0.6)
    return f"; did you mean {plain[close[0]]}?" if close else ""


def one_of(names, *prefixes, rest="PATH", meant=None):
    """An argument type: one of `names`, or one of `prefixes` with `rest` behind it. `meant`: a
    function of another value that returns the one meant, or None."""
    listed = [*names, *(f"{prefix}{rest}" for prefix in prefixes)]
    plain = {_plain(x): y for x, y in zip([*names, *prefixes], listed)}

    def right(value):
        return value in names or any(value.startswith(x) and value != x for x in prefixes)

    def suggestion(value):
        if right(value):
            return value
        return plain.get(_plain(value)) or (meant and meant(value)) or None

    def check(value):
        if right(value):
            return value
        better = suggestion(value)
        better = f"; did you mean {better}?" if better else near(value, listed)
        raise argparse.ArgumentTypeError(f"no {value!r} among {', '.join(listed)}{better}")

    check.meant = suggestion
    return check


def synonyms(text):
    """A function for one_of's `meant`, of lines of a value and the words for it elsewhere."""
    words = {_plain(x): line.split()[0] for line in text.strip().splitlines() for x in line.split()}
    return lambda value: words.get(_plain(value))


on_or_off = synonyms("on true yes 1\noff false no none 0")

def expand(path):
    """A path as text, ~ and ~user replaced by the home directory. Raises UserError where that is
    not known, and for an empty path."""
    path = str(path)
    if not path:
        raise UserError("'' is no path: a variable may be unset")
    own = path.split(os.sep)[0] == "~"
    expanded = path if own and os.environ.get("HOME") == "" else os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split(os.sep)[0][1:]
        lacks = "home directory" if own else f"user {user!r}"
        raise UserError(f"there is no {lacks} for {path}: give the whole path")
    return expanded


def a_path(value):
    """An argument type: the path, ~ and ~user replaced by the home directory."""
    try:
        return expand(value)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


DEVICES = ("cpu", "cuda", "cuda:1", "mps", "xpu")  # as torch spells some
ELSEWHERE = {"": "cuda", "gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "amd": "cuda",
             "metal": "mps", "apple": "mps"}  # fmt: skip


def device(value):
    """An argument type: a device as torch spells it, or as it may; it knows more than DEVICES."""
    parts = re.fullmatch(r"([a-z]*)[\W_]*(\d*)", value.strip().lower())
    meant = parts and ELSEWHERE.get(parts[1], parts[1]) + (parts[2] and f":{parts[2]}")
    if not value or meant != value:
        better = f"; did you mean {meant}?" if parts and value else ""
        better = "; main.py --distribute takes several" if "," in value else better
        raise argparse.ArgumentTypeError(f"no device {value!r} among {', '.join(DEVICES)}{better}")
    return value


def whole(text):
    """The int of 1000, 1e3 or 1000.0. Raises ValueError."""
    with contextlib.suppress(ValueError):
        return int(text)
    x = float(text)
    if not x.is_integer() or abs(x) > 2**53:  # beyond, floats are not exact
        raise ValueError
    return int(x)


def number(kind, least, most=None):
    """An argument type: an int that fits in 63 bits or a finite float, from `least` to `most`."""
    what = "a whole number" if kind is int else "a finite number"
    what += f" from {least}" + ("" if most is None else f" to {most}")
    if most is None:
        most = 2**63 - 1 if kind is int else sys.float_info.max
    convert = whole if kind is int else kind

    def check(value):
        try:
            x = convert(value)
            x = abs(x) if x == 0 else x  # -0.0 is 0.0
        except ValueError:
            x = math.nan
        if not least <= x <= most:
            raise argparse.ArgumentTypeError(f"{value!r} is not {what}")
        return x

    return check


def duration(text):
    """An argument type: seconds of 90s, 9m, 1.5h, 1h30m."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    seconds = sum(float(number) * {"s": 1, "m": 60, "h": 3600}[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: 90s, 9m, 1h30m")
    return seconds


def every(value):
    """An argument type: 500 steps, or 90s, 10m, 2h; returns ("steps", n) or ("seconds", s)."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(value[-1:])
    try:
        least = float(value[:-1]) * unit if unit else int(value)
    except ValueError:
        least = 0
    if not 0 < least < 2**31:
        raise argparse.ArgumentTypeError(
            f"{value!r} is neither a number of steps, as 500, nor a time, as 90s, 10m or 2h"
        )
    return ("seconds", least) if unit else ("steps", least)


def checked(kind):
    """An argument type: the text itself, where `kind` takes it."""
    return lambda value: (kind(value), value)[1]


class Joined(argparse.Action):
    """A flag that may be given several times: one text, the parts separated by commas, so that it
    stands in logs and records as any other value."""

    def __call__(self, parser, namespace, value, option_string=None):
        before = getattr(namespace, self.dest)
        parts = [*(before.split(",") if isinstance(before, str) else []), *value.split(",")]
        setattr(namespace, self.dest, ",".join(dict.fromkeys(filter(None, parts))) or None)


def all_or(kind):
    """An argument type: the word all, or what `kind` takes."""
    return lambda value: value if value == "all" else kind(value)
