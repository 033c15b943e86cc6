"""Locates the first value of a training step that is not finite."""

import torch


def first_nonfinite(net, loss_fn, inputs, labels, micro_bs=None):
    """The first nonfinite value of a batch, in words, or None: weights, the output of a layer, the
    loss, or a gradient, from the last layer on. Leaves the network as it was, without gradients."""
    for name, p in net.named_parameters():
        if not p.isfinite().all():
            return f"the weights of {name}"
    if not len(labels):  # a rank may have no image of the batch
        return None
    names, state = [], {key: x.clone() for key, x in net.state_dict().items()}

    def look(name, tensor):
        if not names and isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
            names.append(name)

    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: look(f"the output of {name}", output)
        )
        for name, module in net.named_modules()
        if not list(module.children())
    ]
    try:
        size = max(micro_bs or len(labels), 1)
        for x, y in zip(inputs.split(size), labels.split(size)):
            net.zero_grad()
            losses = loss_fn(net(x), y)
            look("the loss", losses)
            if not names:
                losses.mean().backward()
                for name, p in reversed(list(net.named_parameters())):
                    look(f"the gradient of {name}", p.grad)
            if names:
                return names[0]
    finally:
        for hook in hooks:
            hook.remove()
        net.zero_grad()
        net.load_state_dict(state)
    return None
