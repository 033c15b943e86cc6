"""Where the first number comes from that is not finite."""

import torch


def first_nonfinite(net, loss_fn, inputs, labels, micro_bs=None):
    """What is first not finite in the passes of a batch, in words, or None where all is finite:
    weights, the output of a layer, the loss or, from the last layer on, a gradient.

    The network is left as it was, but for gradients.
    """
    for name, p in net.named_parameters():
        if not p.isfinite().all():
            return f"the weights of {name}"
    if not len(labels):  # a rank may have none of the images
        return None
    found, state = [], {key: x.clone() for key, x in net.state_dict().items()}
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: _look(found, f"the output of {name}", output)
        )
        for name, module in net.named_modules()
        if not list(module.children())
    ]
    try:
        size = max(micro_bs or len(labels), 1)
        for x, y in zip(inputs.split(size), labels.split(size)):
            net.zero_grad()
            losses = loss_fn(net(x), y)
            _look(found, "the loss", losses)
            if not found:
                losses.mean().backward()
                for name, p in reversed(list(net.named_parameters())):
                    if p.grad is not None:
                        _look(found, f"the gradient of {name}", p.grad)
            if found:
                return found[0]
    finally:
        for hook in hooks:
            hook.remove()
        net.zero_grad()
        net.load_state_dict(state)
    return None


def _look(found, name, tensor):
    if not found and isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
        found.append(name)
