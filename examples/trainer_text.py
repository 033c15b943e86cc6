"""AGD in the Trainer of transformers, with η where dashboards show the learning rate: a small GPT-2
learns the characters of Shakespeare. `python -m examples.trainer_text`

Needs `pip install "transformers[torch]"`. 36 % of the next characters after ten seconds on a CPU.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import bz2
import tempfile

import numpy
import torch
import transformers

from agd import SpectralAGD

LENGTH = 32


class Trainer(transformers.Trainer):
    """Logs η in the place of the scheduler's rate, 1, to its log_history and whatever reports.

    A TrainerCallback comes too late: those that report are called before it.
    """

    def log(self, logs, *args, **kwargs):
        if "learning_rate" in logs:
            logs["learning_rate"] = self.optimizer.optimizer.eta.item()
        super().log(logs, *args, **kwargs)


class Print(transformers.TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **others):
        train = [row for row in state.log_history if "loss" in row][-1]
        print(f"step {state.global_step}: loss {train['loss']:.3f}, test accuracy "
              f"{metrics['eval_accuracy']:.1%}, eta {train['learning_rate']:.3f}")  # fmt: skip


def accuracy(outcome):
    """Of the characters that are predicted: each but the first of a text."""
    return {"accuracy": numpy.mean(outcome.predictions[:, :-1] == outcome.label_ids[:, 1:])}


def main(steps=300, report_to="none", rule=SpectralAGD, out=None):
    """Returns the rows of the Trainer's log. `report_to` may be "tensorboard", "wandb", ..."""
    torch.manual_seed(0)
    path = Path(__file__).parent.parent / "data" / "shakespeare.txt.bz2"
    codes = torch.tensor(list(bz2.open(path, "rb").read(500_000)))
    texts = [{"input_ids": x, "labels": x} for x in codes.split(LENGTH)]
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))  # fmt: skip
    # Trainer calls eval() and train() of SpectralAGD: the average is what it evaluates, and what it
    # saves where an evaluation comes first (save_steps a multiple of eval_steps).
    optimizer = rule(net)
    with tempfile.TemporaryDirectory() as own:
        arguments = transformers.TrainingArguments(
            out or own, max_steps=steps, per_device_train_batch_size=16,
            lr_scheduler_type="constant",
            use_cpu=True,  # this small network; without it on GPUs
            max_grad_norm=0,  # a clipped gradient has lost the size that AGD reads
            logging_steps=50, eval_strategy="steps", eval_steps=50, save_strategy="no",
            report_to=report_to, disable_tqdm=True, per_device_eval_batch_size=100,
        )  # fmt: skip
        trainer = Trainer(
            net, arguments, optimizers=(optimizer, None), callbacks=[Print()],
            train_dataset=texts[:-200], eval_dataset=texts[-200:], compute_metrics=accuracy,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
