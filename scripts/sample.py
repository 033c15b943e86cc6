"""Write text from the checkpoint of a run: `python -m scripts.sample RUN --prompt "ROMEO:"`.

RUN is a log, a record or a checkpoint of a run on text, or the name of one under --out. Without a
--prompt the text begins as a document or a line does. What is written appears token by token; of a
run whose tokens have no known encoding, or whose encoding is not installed, their ids do.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of half an import

import argparse

from cli import Parser, UserError, a_path, command, device, number

NEWLINE = "\n"


def parse(argv=None):
    """(the parser, the arguments)."""
    parser = Parser(prog=command("scripts.sample"), description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("run", metavar="RUN")
    add("--prompt", default="", metavar="TEXT", help="what the text begins with")
    add("--tokens", type=number(int, 1), default=500, metavar="N", help="(default: 500)")
    add("--temperature", type=number(float, 0, 1e3), default=1.0, metavar="T",
        help="divides the logits; 0 takes the likeliest token each time (default: 1)")
    add("--top_k", type=number(int, 1), metavar="K",
        help="draw from the K likeliest tokens (default: all)")
    add("--seed", type=number(int, 0), default=0, help="(default: 0)")
    add("--out", type=a_path, default="output", help="where runs are (default: %(default)s)")
    add("--device", type=device, help="as main.py's")
    args = parser.parse_args(argv)
    if args.temperature == 0:
        parser.refuse(argv, dict.fromkeys(("top_k", "seed"), "goes with a --temperature over 0"))
    return parser, args


if __name__ == "__main__":
    parse()  # a mistake is refused before torch is imported, which takes seconds

import torch

from data import DataError
from data.common import reason
from data.encoding import read_encoding
from training.saved import open_run


def main(argv=None):
    """Run the command line; returns the exit code."""
    _, args = parse(argv)
    try:
        write(args)
        return 0
    except BrokenPipeError:  # who reads has enough
        return 0
    except OSError as error:
        print(f"error: the text cannot be written: {reason(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def write(args):
    """Print the text of a run."""
    saved = open_run(args.run, args.out)
    shape = saved.first.get("shape", ())
    if len(shape) != 1:
        raise UserError(f"{saved.log} is a run on images: a text comes from --arch gpt")
    encoding, start = encoded(saved.first["data"].get("encoding"), args.prompt)
    if max(start) >= saved.first["classes"]:
        raise DataError(f"the prompt has the token {max(start)}, and the vocabulary of "
                        f"{saved.log} ends with {saved.first['classes'] - 1}")  # fmt: skip
    where = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        net = saved.network().to(where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {where} cannot be used: {str(error).splitlines()[0]}") from error
    show = encoding.stream() if encoding else lambda ids: f"{ids[0]} "
    # A command whose text is lost has failed: past the guard, which lets a run go on.
    out = getattr(sys.stdout, "stream", sys.stdout)
    print(args.prompt, end="", file=out, flush=True)
    for token in sampled(net, start, args.tokens, shape[0], args.temperature, args.top_k,
                         torch.Generator(where).manual_seed(args.seed)):  # fmt: skip
        print(show([token]), end="", file=out, flush=True)
    print(file=out, flush=True)


def encoded(description, prompt):
    """(the Encoding or None where it cannot be had, the ids that the text goes on from)."""
    try:
        encoding = read_encoding(description)
    except DataError as error:
        if prompt:
            raise DataError(f"--prompt needs an encoding: {error}") from error
        print(f"Note: ids of tokens, because {error}", file=sys.stderr)
        return None, [0]
    if not prompt and encoding.end is not None:
        return encoding, [encoding.end]
    return encoding, encoding.encode(prompt or NEWLINE).tolist()


@torch.inference_mode()
def sampled(net, start, count, context, temperature=1.0, top_k=None, generator=None):
    """Yield `count` token ids that follow `start`, drawn from the softmax of the network's logits
    over `temperature`, of the `top_k` likeliest tokens or of all. The network, in evaluation mode,
    sees the last `context` tokens."""
    device = next(net.parameters()).device
    tokens = torch.tensor([start], device=device)
    for _ in range(count):
        tokens = tokens[:, -context:]
        logits = net(tokens)[0, -1].float()
        if temperature:
            if top_k is not None and top_k < len(logits):
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            chances = ((logits - logits.max()) / max(temperature, 1e-6)).softmax(0)
            token = torch.multinomial(chances, 1, generator=generator)
        else:
            token = logits.argmax()[None]
        tokens = torch.cat([tokens, token[None]], 1)
        yield token.item()


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
