"""AGD in the Trainer of transformers: a small GPT-2 learns the characters of this repository's
README. `python -m examples.trainer_text`

Needs transformers and accelerate (requirements-libraries.txt); some seconds on a CPU.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from agd import AGD

LENGTH = 32


class Print(TrainerCallback):
    def __init__(self, agd):
        self.agd = agd

    def on_log(self, args, state, control, logs=None, **others):
        if "loss" in logs:
            print(f"step {state.global_step}: loss {float(logs['loss']):.3f}, "
                  f"eta {self.agd.eta:.3f}")  # fmt: skip


def main(steps=200):
    """Returns the mean loss of each twenty steps."""
    torch.manual_seed(0)
    text = Path(__file__).parent.parent.joinpath("README.md").read_bytes()
    codes = torch.tensor(list(text))
    pieces = codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)
    net = GPT2LMHeadModel(GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0))  # fmt: skip
    optimizer = AGD(net)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, max_steps=steps, per_device_train_batch_size=16, use_cpu=True,
            max_grad_norm=0,  # a clipped gradient has lost the size that AGD reads
            logging_steps=20, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(net, arguments, optimizers=(optimizer, constant), callbacks=[
            Print(optimizer)], train_dataset=[{"input_ids": x, "labels": x} for x in pieces])
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    main()
